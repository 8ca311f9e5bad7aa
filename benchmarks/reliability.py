"""What gatewatt promises about reliability, put to the test: rows 1 to 17, each a command that writes what came out.

    python benchmarks/reliability.py                      # all rows, in the numbers that are promised
    python benchmarks/reliability.py 3 5 --count 100      # these rows, so many trials each
    python benchmarks/reliability.py --small              # all rows, a few trials each: minutes
    python benchmarks/reliability.py 13 --data FOLDER     # with a data set, for the figures of the cards
    python benchmarks/reliability.py --render             # the table in RELIABILITY.md, from what was written last

Outcomes go to benchmarks/results/reliability/row-NN.json and from there into the table of RELIABILITY.md. Exit code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability"
PAGE = ROOT / "RELIABILITY.md"
BEGIN, END = "<!-- the table below is written by benchmarks/reliability.py -->", "<!-- end of the table -->"


class Row(NamedTuple):
    """One promise.

    Attributes:
        promise: in a few words, as the table says it.
        home: module and function that put it to the test.
        full: trials that are promised.
        small: trials of a quick check.
    """

    promise: str
    home: str
    full: int
    small: int


ROWS = {
    1: Row("ledger = fvcore trace = dispatcher / 2 = hooks, on forced random gate patterns", "flops.routes", 1000, 12),
    2: Row("a batch that really skips equals masking: gates, logits to 1e-6, and the ledger's FLOPs", "flops.skipped", 1000, 12),
    3: Row("SIGKILL at random moments of energy-adversarial training: the resumed run ends byte-identical", "resume.kills", 100, 2),
    4: Row("resume from every step's checkpoint over an epoch boundary, 0 and 2 workers: identical weights", "resume.every_step", 24, 2),
    5: Row("SIGTERM, SIGINT, full disk, read-only disk, temporary folder elsewhere: saved, said, exit 143, 130, 1", "stops.stops", 10, 1),
    6: Row("2 processes = 1 process, to the last image; fewer images than processes refused in one line", "processes.evaluation", 50, 4),
    7: Row("malformed recipes: one line with file and key, exit code 2, nothing runs", "recipes.malformed", 100, 16),
    8: Row("damaged, hostile and foreign checkpoints: refused in one line, nothing executed", "checkpoints.damaged", 200, 15),
    9: Row("bad images: named, none scored in silence", "images.bad", 18, 18),
    10: Row("GradMDM's direction = plain NumPy in float64 to 1e-10; never turned against open gates", "attacks.formula", 1000, 50),
    11: Row("an attack leaves the network as it was, to the byte, in fit, validate, test and predict", "attacks.untouched", 25, 2),
    12: Row("self-checks: gradients alive, decisions repeatable, the attack stronger than noise of its size", "attacks.checked", 100, 4),
    13: Row("shipped weights give the figures of their cards again, to two decimals", "cards.repeated", 100, 1),
    14: Row("the same recipe twice: the same weights, bit for bit", "resume.repeated", 5, 1),
    15: Row("torchrun restarts after a rank was killed, and ends identical; so does a run of two agents", "resume.torchrun", 5, 1),
    16: Row("quick answers without torch; the test suite with the network off", "offline.offline", 100, 1),
    17: Row("every figure of the README's results stands in a result file", "readme.figures", 10_000, 10_000),
}


def function(row: int) -> Any:
    """What puts a row to the test."""
    module, name = ROWS[row].home.split(".")
    # As a script this file is not part of a package; its parts import one another by their full names.
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return getattr(import_module(f"benchmarks.promises.{module}"), name)


def measure(row: int, count: int, *, data: Path | None = None) -> dict[str, Any]:
    """Put one row to the test in a temporary folder.

    Args:
        row: its number.
        count: trials.
        data: folder of a data set, for the rows that need one.

    Returns:
        What is written down: trials held, of how many, what went wrong, seconds, machine and versions.
    """
    test = function(row)
    from benchmarks.promises.base import NotMeasured

    facts: dict[str, Any] = {"row": row, "promise": ROWS[row].promise, "count": count, "promised": ROWS[row].full}
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"gatewatt-row-{row}-") as folder:
        try:
            outcome = test(count, Path(folder), **({"data": data} if row == 13 else {}))
        except NotMeasured as reason:
            facts |= {"kept": None, "held": 0, "of": 0, "note": f"not measured: {reason}", "failures": [], "missing": ""}
        # The other rows go on; this one did not hold.
        except Exception as error:
            note = f"the test itself ended with {type(error).__name__}"
            facts |= {"kept": False, "held": 0, "of": 1, "note": note, "failures": [traceback.format_exc()[-3000:]], "missing": ""}
        else:
            facts |= {"kept": outcome.kept, **outcome._asdict(), "failures": list(outcome.failures)}
    versions = {package: version(package) for package in ("torch", "lightning", "fvcore")}
    machine = {"system": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}
    return {**facts, "seconds": round(time.monotonic() - begun, 1), "commit": commit(), "machine": machine}


def commit() -> str | None:
    """The commit of the source tree, with a mark if it holds changes."""
    try:
        said = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()


def table(records: dict[int, dict[str, Any]]) -> str:
    """The table of all rows, as Markdown."""
    lines = ["| # | promise | held | of | promised | seconds | what was measured |", "|--:|---|--:|--:|--:|--:|---|"]
    for row, entry in ROWS.items():
        record = records.get(row)
        if record is None:
            lines.append(f"| {row} | {entry.promise} | | | | | not run yet |")
            continue
        held = f"**{record['held']}**" if record["kept"] is False else str(record["held"])
        trials = "full" if record["count"] >= entry.full else f"{record['count']} of {entry.full}"
        # Records of earlier versions do not say it.
        trials += f", without {record['missing']}" if record.get("missing") else ""
        note = record["note"] + (f"; first failure: {record['failures'][0]}" if record["failures"] else "")
        note = note.replace("|", "\\|").replace("\n", " ")[:400]
        if record["kept"] is None:
            lines.append(f"| {row} | {entry.promise} | | | | {record['seconds']:.0f} | {note} |")
        else:
            lines.append(f"| {row} | {entry.promise} | {held} | {record['of']} | {trials} | {record['seconds']:.0f} | {note} |")
    return "\n".join(lines)


def render() -> None:
    """Write the table of the last outcomes into RELIABILITY.md."""
    records = {record["row"]: record for path in RESULTS.glob("row-*.json") for record in [json.loads(path.read_text(encoding="utf-8"))]}
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(records)}\n\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Measure, write down, render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="*", choices=[*ROWS, []], help="rows to run; all by default")
    parser.add_argument("--count", type=int, help="trials of each row; by default as many as are promised")
    parser.add_argument("--small", action="store_true", help="a few trials of each row")
    parser.add_argument("--data", type=Path, help="folder of the CIFAR-10 copy, for row 13")
    parser.add_argument("--render", action="store_true", help="only bring the table up to date")
    options = parser.parse_args()
    broken = False
    for row in [] if options.render else options.rows or list(ROWS):
        count = options.count or (ROWS[row].small if options.small else ROWS[row].full)
        record = measure(row, count, data=options.data)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"row-{row:02}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        said = "not measured" if record["kept"] is None else f"{record['held']} of {record['of']}"
        print(f"row {row}: {said} in {record['seconds']:.0f} s: {record['note']}", flush=True)
        for failure in record["failures"][:10]:
            print(f"  {failure}", flush=True)
        broken |= record["kept"] is False
    render()
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())
