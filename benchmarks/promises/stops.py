"""Row 5: a run that is asked to stop, or whose disk takes no more, keeps its last good checkpoint, says so, and ends with the right code."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.promises.base import NotMeasured, Outcome, complaints, differences, environment, finish, start, tally
from benchmarks.promises.resume import prepare, wait_for

FOREGROUND = "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); os.execv(sys.argv[1], sys.argv[1:])"
"""Runs a command with Ctrl+C as a terminal has it, whatever this process ignores."""
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


def stops(count: int, folder: Path) -> Outcome:
    """SIGTERM and SIGINT ``count`` times each at random moments, and to two processes; a full disk, a read-only one, a temporary folder elsewhere."""
    training = prepare(folder).training
    results = [stopped(number, index, folder, training) for index in range(count) for number in SIGNALS]
    results += both_stopped(folder)
    note, missing = f"{len(SIGNALS) * count} signals to one process, {len(SIGNALS)} to two", ""
    try:
        results += disks(folder)
        note += "; a full disk, a read-only disk and a full temporary folder on file systems made for it"
    except NotMeasured as reason:
        missing = f"disks: {reason}"
    return tally(results, note, missing=missing)


def stopped(number: signal.Signals, index: int, folder: Path, training: float) -> str | None:
    """Send one signal at a random moment of the ``training`` seconds that the run works, and resume with the command that is printed."""
    name, chance = f"{number.name.lower()}-{index}", random.Random(f"{number.name} {index}")
    for attempt in range(20):
        run, log = folder / "runs" / f"{name}-{attempt}", folder / f"{name}-{attempt}.log"
        process = start(["fit", "-c", "small.yaml", "--run", run.name, "--resume", "auto"], folder, log)
        wait_for(run / "metrics.jsonl", process, None)
        process.join(chance.uniform(0, training))
        if process.exitcode is not None:
            continue  # it was over before it could be stopped
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(300)
        if process.exitcode == 0 and (run / "result.json").exists():
            continue  # the last step was done already
        if process.exitcode != SIGNALS[number]:
            return f"{name}: exit code {process.exitcode}, expected {SIGNALS[number]}"
        if not (run / "interrupted.ckpt").exists() or "resume with: gatewatt fit" not in log.read_text():
            return f"{name}: nothing was saved, or it was not said how to resume"
        code = finish(["fit", "-c", "small.yaml", "--run", run.name, "--resume", "auto"], folder, log)
        found = differences(folder / "runs" / "whole", run) if code == 0 else [f"exit code {code} of the resumed run"]
        return f"{name}: {'; '.join(found)}" if found else None
    return f"{name}: never met the run at work"


def both_stopped(folder: Path) -> list[str | None]:
    """Stop a run of two processes, by SIGTERM to the first and by Ctrl+C to both, and resume it."""

    def command(name: str, log: Path) -> subprocess.Popen[bytes]:
        # The clean warm-up trains no gates.
        strategy = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"]
        arguments = ["fit", "-c", "small.yaml", "--run", name, "--resume", "auto", *strategy]
        stream = log.open("ab")
        # A process group of their own, as a terminal would give them, and signals as they are in one.
        line = [sys.executable, "-c", FOREGROUND, sys.executable, "-m", "gatewatt", *arguments]
        return subprocess.Popen(line, cwd=folder, env=environment(), stdout=stream, stderr=stream, start_new_session=True)

    if command("two", folder / "two.log").wait(600) != 0:
        return [f"two processes: {(folder / 'two.log').read_text()[-500:]}"]
    results: list[str | None] = []
    for number, expected in SIGNALS.items():
        name = f"two-{number.name.lower()}"
        run, log = folder / "runs" / name, folder / f"{name}.log"
        process = command(name, log)
        while not (run / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
        code = process.wait(300)
        if code != expected or log.read_text().count("resume with: gatewatt fit") != 1:
            results.append(f"{name}: exit code {code}, expected {expected}; {log.read_text()[-300:]}")
            continue
        code = command(name, log).wait(600)
        found = differences(folder / "runs" / "two", run) if code == 0 else [f"exit code {code} of the resumed run"]
        results.append(f"{name}: {'; '.join(found)}" if found else None)
    return results


def disks(folder: Path) -> list[str | None]:
    """The cases that need file systems of their own, in a mount namespace that ends with them.

    Raises:
        NotMeasured: where the system grants none.
    """
    if shutil.which("unshare") is None:
        raise NotMeasured("there is no command unshare")
    rights = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*rights, "true"], capture_output=True, check=False).returncode != 0:
        raise NotMeasured("this system grants no mount namespace")
    command = [*rights, sys.executable, "-m", "benchmarks.promises.stops", str(folder.resolve())]
    answer = subprocess.run(command, env=environment(), cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    if answer.returncode != 0:
        raise RuntimeError(f"the cases of full and read-only disks: {answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def mounted(folder: Path, megabytes: int) -> Path:
    """A small file system in memory."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=True)
    return folder


def at_work(arguments: list[str], place: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start the command in ``place`` and wait until it has written its first checkpoint."""
    stream = log.open("wb")
    process = subprocess.Popen([sys.executable, "-m", "gatewatt", *arguments], cwd=place, env=environment(), stdout=stream, stderr=stream)
    deadline = time.monotonic() + 300
    while not list(place.rglob("last.ckpt")):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the run never wrote a checkpoint: {log.read_text()[-1000:]}")
        time.sleep(0.01)
    return process


def fill(place: Path) -> Path:
    """Leave no byte of a file system free."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as stream:
        for block in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    stream.write(b"\0" * block)
            except OSError:
                continue
    return filler


def inside(folder: Path) -> list[str | None]:
    """All cases, within the namespace."""
    # Long enough to be at work when the disk is full.
    recipe = (folder / "small.yaml").read_text().replace("max_epochs: 3", "max_epochs: 12").replace("every: 2", "every: 1")
    arguments = ["fit", "-c", "long.yaml", "--run", "full", "--resume", "auto", "--trainer.logger", "false"]
    whole = folder / "long"
    whole.mkdir()
    (whole / "long.yaml").write_text(recipe)
    subprocess.run([sys.executable, "-m", "gatewatt", *arguments], cwd=whole, env=environment(), capture_output=True, check=True)
    return [full(folder, recipe, arguments), readonly(folder, recipe, arguments), elsewhere(folder)]


def full(folder: Path, recipe: str, arguments: list[str]) -> str | None:
    """A disk that fills up in the middle of training."""
    place, log = mounted(folder / "full-disk", 8), folder / "full.log"
    (place / "long.yaml").write_text(recipe)
    process = at_work(arguments, place, log)
    filler = fill(place)
    code = process.wait(300)
    wrong = answered(code, log, "No space left on device")
    filler.unlink()
    return f"full disk: {wrong}" if wrong else continued(arguments, place, folder, "full disk")


def readonly(folder: Path, recipe: str, arguments: list[str]) -> str | None:
    """A disk that becomes read-only in the middle of training."""
    place, log = mounted(folder / "read-only-disk", 8), folder / "read-only.log"
    (place / "long.yaml").write_text(recipe)
    process = at_work(arguments, place, log)
    # Busy while a file is being written.
    while subprocess.run(["mount", "-o", "remount,ro", str(place)], capture_output=True, check=False).returncode != 0:
        if process.poll() is not None:
            return "read-only disk: the run was over before"
        time.sleep(0.002)
    code = process.wait(300)
    wrong = answered(code, log, "Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    return f"read-only disk: {wrong}" if wrong else continued(arguments, place, folder, "read-only disk")


def answered(code: int, log: Path, reason: str) -> str | None:
    """What is wrong with the end of a run whose disk took no more, or None."""
    lines = complaints(log)
    if code != 1:
        return f"exit code {code}, expected 1: {log.read_text()[-500:]}"
    if len(lines) != 1 or reason not in lines[0] or "the last good checkpoint is" not in lines[0]:
        return f"expected one line with the reason and the last good checkpoint, got {lines}"
    if "Traceback" in log.read_text():
        return "there is a traceback"
    return None


def continued(arguments: list[str], place: Path, folder: Path, what: str) -> str | None:
    """Resume with room to write, and compare with the run whose disk had it."""
    log = folder / f"{what} again.log"
    with log.open("wb") as stream:
        code = subprocess.run([sys.executable, "-m", "gatewatt", *arguments], cwd=place, env=environment(), stdout=stream, stderr=stream).returncode
    found = differences(folder / "long" / "runs" / "full", place / "runs" / "full") if code == 0 else [f"exit code {code}: {log.read_text()[-500:]}"]
    return f"{what}, resumed: {'; '.join(found)}" if found else None


def elsewhere(folder: Path) -> str | None:
    """A temporary folder on another disk that has no room at all: checkpoints never pass through it."""
    place = mounted(folder / "other-disk", 1)
    fill(place)
    arguments = ["fit", "-c", "small.yaml", "--run", "elsewhere"]
    answer = subprocess.run(
        [sys.executable, "-m", "gatewatt", *arguments], cwd=folder, env=environment(TMPDIR=str(place)), capture_output=True, text=True, check=False
    )
    found = differences(folder / "runs" / "whole", folder / "runs" / "elsewhere") if answer.returncode == 0 else [answer.stderr[-500:]]
    return f"temporary folder on a full disk: {'; '.join(found)}" if found else None


if __name__ == "__main__":
    print(json.dumps(inside(Path(sys.argv[1]))))
