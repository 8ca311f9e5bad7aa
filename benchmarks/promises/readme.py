"""Row 17: every figure of the README's results stands in a result file that one command wrote."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.promises.base import ROOT, Outcome, tally

NUMBER = re.compile(r"(?<![\w./-])\d+\.\d+(?![\w.-]*\d)")
ROW = re.compile(r"\| *`([\w.-]+)` *\|")
HEADING = "## Results"


def figures(count: int, folder: Path) -> Outcome:
    """Every decimal number of the README's results, the first ``count`` of them, looked up in cards, summaries and tables of results."""
    return compared(ROOT / "README.md", count)


def compared(readme: Path, count: int) -> Outcome:
    """The decimal numbers of the results of a README against the files beside it."""
    text = readme.read_text(encoding="utf-8")
    section = text[text.index(HEADING) :] if HEADING in text else ""
    section = section[: end.start()] if (end := re.search(r"\n## (?!Results)", section)) else section
    known = list(numbers(readme.parent))
    results: list[str | None] = []
    for line in section.splitlines():
        # The row of a checkpoint must be that checkpoint's: among thousands of numbers many agree by chance.
        named = ROW.match(line)
        pool = list(numbers(readme.parent, named[1])) if named else known
        for token in NUMBER.findall(line):
            results.append(None if stands(token, pool) else f"{token} in {line.strip()[:100]!r} is in no result file")
    results = results[:count]
    return tally(results, f"{len(known):,} numbers in cards and benchmarks/results")


def stands(token: str, known: list[float]) -> bool:
    """Whether a number, as it is printed, is one of the numbers known, as they are or as percent or millions."""
    digits, value = len(token.partition(".")[2]), float(token)
    half = 0.5 * 10.0**-digits * (1 + 1e-9)
    return any(abs(scale * number - value) <= half for number in known for scale in (1, 100, 1e-6))


def numbers(root: Path, checkpoint: str | None = None) -> Iterator[float]:
    """Every number of the result files of a source tree, or of those named after one checkpoint, and FLOPs as shares of dense."""
    for path in sorted([*root.glob("checkpoints/*.json"), *root.glob("benchmarks/results/**/*.json")]):
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or (checkpoint is not None and checkpoint not in (path.stem, path.parent.name, tested(document))):
            continue
        yield from numbers_in(document)
        for part in (document, document.get("measured")):
            if isinstance(part, dict) and isinstance(part.get("flops_dense"), (int, float)):
                yield from (part[key] / part["flops_dense"] for key in part if key.startswith("flops_") and isinstance(part[key], (int, float)))
    # Pages are rendered from records by the same commands: medians and ratios stand there alone.
    for path in sorted(root.glob("benchmarks/results/**/*.md")) if checkpoint is None else []:
        yield from map(float, NUMBER.findall(path.read_text(encoding="utf-8")))
    for path in sorted(root.glob("benchmarks/results/*.csv")) if checkpoint is None else []:
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.reader(stream):
                yield from (number for cell in row if (number := parsed(cell)) is not None)


def tested(document: dict[str, Any]) -> str | None:
    """The checkpoint that a summary is about."""
    network = document.get("network")
    return network.get("checkpoint") if isinstance(network, dict) else None


def parsed(cell: str) -> float | None:
    """A cell of a table as a finite number, or None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def numbers_in(value: Any) -> Iterator[float]:
    """Every number of a JSON document."""
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield float(value)
    elif isinstance(value, dict):
        for below in value.values():
            yield from numbers_in(below)
    elif isinstance(value, list):
        for below in value:
            yield from numbers_in(below)
