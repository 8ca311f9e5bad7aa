"""Row 16: quick answers, and a test suite that needs no network."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.promises.base import ROOT, Outcome, environment, gatewatt, tally

QUICK = ("--help", "--version", "fit --help", "test --help", "completion bash", "report --help", "price --help")
FEW = ("tests/recipes/test_merging.py", "tests/recipes/test_finding.py")


def offline(count: int, folder: Path, *, timed: bool = True) -> Outcome:
    """Quick answers under 1 s without torch, the full help under 8 s; the tests with the network off.

    Args:
        count: below 100, only a few of the tests run.
        folder: where to work.
        timed: judge the seconds too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: list[str | None] = []
    slowest = 0.0
    for line in QUICK:
        seconds = cold(line.split(), folder, 3 if timed else 1)
        slowest = max(slowest, seconds)
        results += [f"gatewatt {line}: {seconds:.2f} s" if timed and seconds >= 1 else None, imports(line.split())]
    full = cold(["fit", "--help-all"], folder, 3 if timed else 1)
    results.append(f"gatewatt fit --help-all: {full:.1f} s" if timed and full >= 8 else None)
    note = f"slowest quick answer {slowest:.2f} s, fit --help-all {full:.1f} s"
    apart = isolation()
    if apart is None:
        return tally(results, note, missing="the tests: no network namespace")
    what = ["src", "tests"] if count >= 100 else list(FEW)
    # Two processes talk to each other in some tests, so this machine's own address stays up.
    inner = ["sh", "-c", 'ip link set lo up; exec "$@"', "sh", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command = [*apart, *inner, *(["-n", "2"] if count >= 100 else []), f"--basetemp={folder / 'pytest'}", *what]
    changes = {key: value for key, value in environment().items() if key != "PYTHONPATH"}
    answer = subprocess.run(command, cwd=ROOT, env=changes, capture_output=True, text=True, timeout=7200, check=False)
    lines = answer.stdout.strip().splitlines() or [answer.stderr[-300:]]
    summary, failed = lines[-1], [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    results.append(None if answer.returncode == 0 else f"tests without network: {summary}; {'; '.join(failed)[:2000]}")
    passed = re.search(r"\d+ passed", summary)
    return tally(results, f"{note}; {passed[0] if passed else summary} with the network off")


def cold(arguments: list[str], folder: Path, rounds: int) -> float:
    """Seconds of a command, the median of some rounds."""
    times = []
    for _ in range(rounds):
        begun = time.monotonic()
        answer = gatewatt(arguments, folder)
        times.append(time.monotonic() - begun)
        assert answer.returncode == 0, answer.stderr
    return statistics.median(times)


def imports(arguments: list[str]) -> str | None:
    """Whether a quick answer waits for torch."""
    script = f"import sys\nfrom gatewatt.cli import main\nmain({arguments!r})\nsys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, check=False)
    return f"gatewatt {' '.join(arguments)} imports torch" if answer.returncode else None


def isolation() -> list[str] | None:
    """The command in front of another that takes its network away, or None where the system grants none."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return None
    command = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--net", "--map-root-user"]
    return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else None
