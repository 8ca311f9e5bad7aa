"""Latency of the execution that really skips, against the dense one, beside the fraction of FLOPs that it runs; for every family.

    python benchmarks/skipped.py [--checkpoints NAME ...] [--data FOLDER] [--batches 1 128] [--rounds 20] [--out benchmarks/results/skipped]

Without names: every checkpoint that ships, those on CIFAR-10 where FOLDER (test/<class>/*) is given. A name may be a .safetensors file, too; what
is not trained on digits takes its images from FOLDER. Real images decide the gates: latency depends on what runs. Dense, skipped and masked passes
(masked is what most published code executes) are timed in turn inside one run on the same images, in float32, on OMP_NUM_THREADS threads.

Every checkpoint leaves <out>/<name>.csv, one line per round; SKIPPED.md is rendered from these files. A checkpoint measured again replaces its file.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from families import data_of
from timing import describe_machine, seconds_of_rounds
from torch import Tensor

from gatewatt import load, price
from gatewatt.files import write_text
from gatewatt.gating import DynamicNetwork, Execution
from gatewatt.shipped import shipped

EXECUTIONS: tuple[Execution, ...] = ("dense", "skipped", "masked")
COLUMNS = ("checkpoint", "batch", "passes", "images", "flops_fraction", *(f"{execution}_ms" for execution in EXECUTIONS), "machine")
"""Of a line: ``<execution>_ms`` is the time of one pass in its round, a mean over the ``passes`` on different images."""


def run(network: DynamicNetwork, batches: list[Tensor], execution: Execution) -> None:
    """One pass over every batch."""
    for images in batches:
        network(images, execution)


def measure(name: str, folder: str | None, batch: int, rounds: int) -> list[dict[str, object]] | None:
    """Time a checkpoint at one batch size: a line per round, or None where its images are not at hand.

    Raises:
        ValueError: if there are fewer test images than one batch holds.
    """
    # For single images, as many different ones per round as make the route representative.
    passes = max(1, 32 // batch)
    data = data_of(name, folder, batch * passes, batch)
    if data is None:
        return None
    network = load(name).to(memory_format=torch.channels_last)
    data.setup("test")
    batches = [item.images.contiguous(memory_format=torch.channels_last) for item in data.test_dataloader()]
    if [len(images) for images in batches] != [batch] * passes:
        raise ValueError(f"batches: {name} has only {sum(map(len, batches))} test images at hand, fewer than a batch of {batch}")
    ledger = price(network, batches[0][:1])
    with torch.inference_mode():
        flops = torch.cat([ledger(network(images, "skipped").gates) for images in batches]).mean().item()
        cases = {execution: partial(run, network, batches, execution) for execution in EXECUTIONS}
        seconds = seconds_of_rounds(cases, rounds=rounds)
    shared = {"checkpoint": Path(name).stem, "batch": batch, "passes": passes, "images": batch * passes, "flops_fraction": flops / ledger.dense}
    timed = [{f"{execution}_ms": 1e3 * seconds[execution][turn] / passes for execution in EXECUTIONS} for turn in range(rounds)]
    return [{**shared, **each, "machine": describe_machine()} for each in timed]


def write(path: Path, lines: Sequence[dict[str, object]]) -> None:
    """Write lines as CSV, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(lines)
    write_text(path, text.getvalue())


def rows_of(path: Path) -> list[list[str]]:
    """One row of the table per batch size of a CSV file; ratios are medians of the rounds' own ratios."""
    with path.open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    rows = []
    for batch in sorted({int(line["batch"]) for line in lines}):
        turns = [line for line in lines if int(line["batch"]) == batch]
        times = {execution: [float(turn[f"{execution}_ms"]) for turn in turns] for execution in EXECUTIONS}
        ratios = {
            execution: statistics.median(own / dense for own, dense in zip(times[execution], times["dense"], strict=True)) for execution in EXECUTIONS
        }
        rows.append(
            [
                f"`{turns[0]['checkpoint']}`",
                str(batch),
                f"{100 * float(turns[0]['flops_fraction']):.1f} %",
                *(f"{statistics.median(times[execution]):.2f}" for execution in ("dense", "skipped")),
                *(f"{ratios[execution]:.2f}" for execution in ("skipped", "masked")),
                str(len(turns)),
            ]
        )
    return rows


def render(folder: Path) -> str:
    """The page of all CSV files of a folder.

    Raises:
        FileNotFoundError: if it holds none.
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise FileNotFoundError(f"no checkpoint was measured into {folder}; those on CIFAR-10 need --data FOLDER")
    machines = sorted({line["machine"] for file in files for line in csv.DictReader(file.read_text(encoding="utf-8").splitlines())})
    columns = ("checkpoint", "batch", "FLOPs of dense", "dense ms", "skipped ms", "skipped / dense", "masked / dense", "rounds")
    text = [
        "# Latency of skipped execution",
        "",
        "Rendered by `python benchmarks/skipped.py` from the CSV files beside this page. Milliseconds are those of one pass over a batch, medians",
        "over rounds; ratios are medians of the rounds' own. A ratio equal to the fraction of FLOPs would mean that what is saved in FLOPs is saved",
        f"in time, one above 1 that skipping costs time. Float32; {'; '.join(machines)}.",
        "",
        "| " + " | ".join(columns) + " |",
        "|---|" + "--:|" * (len(columns) - 1),
        *("| " + " | ".join(cells) + " |" for file in files for cells in rows_of(file)),
    ]
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, then render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoints", nargs="+", default=None, help="default: all that ship")
    parser.add_argument("--data", default=None, help="folder with test/<class>/*, for what is not trained on digits")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/skipped"))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.checkpoints or shipped("checkpoints", ".safetensors"):
        measured = [measure(name, options.data, batch, options.rounds) for batch in options.batches]
        lines = [line for each in measured if each is not None for line in each]
        if not lines:
            print(f"{name}: left out, its images need --data FOLDER")
            continue
        path = options.out / f"{Path(name).stem}.csv"
        write(path, lines)
        for cells in rows_of(path):
            print(" | ".join(cells), flush=True)
    (options.out / "SKIPPED.md").write_text(render(options.out), encoding="utf-8")


if __name__ == "__main__":
    main()
