"""One table over checkpoints of all families: accuracy, what the gates save, and what GradMDM takes back.

    python benchmarks/families.py [--checkpoints NAME ...] [--data FOLDER] [--images 1000] [--gamma 100] [--steps 100] [--parents FILE ...]

Every checkpoint leaves summary.json, records.csv and dense.json in benchmarks/results/families/<name>; an attack that is there already is not run
again, and what its dense.json lacks is measured on the images of its records. The table is rendered from these files. FOLDER holds
test/<class>/* of CIFAR-10, for checkpoints trained on it; digits are embedded.

Each FILE is a static parent, exported by a stage trained dense, or a stage between: what the card of a checkpoint says that it started from, and
the cards of those, found by their file names.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from attack_run import emptied, run_attack
from torch import Tensor

from gatewatt import load, price
from gatewatt.attacks import GradMDM
from gatewatt.data import DigitsData, FolderData, ImageData
from gatewatt.flops import FlopsLedger
from gatewatt.gating import gate_table, measuring_execution
from gatewatt.metrics.record import read_records
from gatewatt.networks.checkpoint import card_of
from gatewatt.shipped import find_checkpoint, shipped

COLUMNS = (
    "checkpoint",
    "accuracy",
    "static",
    "FLOPs",
    "sd",
    "at full",
    "routes' FLOPs",
    "gates that vary",
    "attack",
    "recovery",
    "PSNR",
    "8-bit",
    "attacked",
    "images",
)


def data_of(name: str, folder: str | None, images: int, batch: int | None = None) -> ImageData | None:
    """Test images of the data set that a checkpoint was trained on; None without a folder, unless these are the embedded digits.

    Args:
        name: of the checkpoint.
        folder: holds ``test/<class>/*`` (or ``val``, as ImageNet does) of that data set.
        images: how many.
        batch: images side by side; by default what an attack takes well.
    """
    card = card_of(name)
    if card["dataset"] == "digits":
        return DigitsData(eval_batch_size=batch or 100, test_images=min(images, 400))
    if folder is None:
        return None
    size = card.get("size") or 32
    split = "test" if (Path(folder) / "test").is_dir() else "val"
    return FolderData(
        folder, name=card["dataset"], size=size, test=split, in_memory=size <= 64, test_images=images, eval_batch_size=batch or 125, on_bad="convert"
    )


def task_of(name: str) -> dict[str, Any]:
    """Arguments of the task that trained a checkpoint, from the recipe in its card; empty without one."""
    recipe = yaml.safe_load(card_of(name).get("recipe") or "{}")
    return recipe.get("model", {}).get("init_args", {})


def origin_of(name: str) -> str:
    """File name, without its suffix, of what the card of a checkpoint says that it started from; empty if nothing."""
    return Path(task_of(name).get("checkpoint") or "").stem


def parents_of(names: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """Checkpoint -> that of ``files`` which was trained dense, and which its card, or those of the stages between, say that it started from.

    Raises:
        SystemExit: for a file that no card on the way names, or one that was neither trained dense nor started from a file given here: an earlier
            stage of a dynamic network is no static counterpart.
    """
    given = {find_checkpoint(file).stem: file for file in files}
    parents: dict[str, str] = {}
    named: set[str] = set()
    for name in names:
        stems = [origin_of(name)]
        while stems[-1] in given and task_of(given[stems[-1]]).get("execution") != "dense":
            file, before = given[stems[-1]], origin_of(given[stems[-1]])
            if before not in given or before in stems:
                raise SystemExit(f"--parents: {file} was not trained with execution dense, and none that was is given behind it")
            stems.append(before)
        if stems[-1] in given:
            parents[name] = given[stems[-1]]
            named.update(stems)
    if unnamed := sorted(given.keys() - named):
        started = ", ".join(filter(None, map(origin_of, names)))
        raise SystemExit(f"--parents: the cards of these checkpoints name {started or 'no parent'}, not {unnamed[0]}")
    return parents


def compare(name: str, data: ImageData, parent: str | None, folder: Path) -> None:
    """Count what the static counterparts get right and which gates vary, on the images of the records: dense.json.

    Raises:
        SystemExit: if the records are of other images or weights.
    """
    network, static = load(name), None if parent is None else load(parent)
    execution = measuring_execution(network)
    ledger: FlopsLedger | None = None
    flops: dict[int, float] = {}
    executed: list[Tensor] = []
    right = right_parent = 0
    data.setup("test")
    with torch.no_grad():
        for images, labels, ids in data.test_dataloader():
            ledger = ledger or price(network, images[:1])
            gates = network(images, execution).gates
            flops |= dict(zip(ids.tolist(), ledger(gates).tolist(), strict=True))
            executed.append(gate_table(gates).executed)
            right += int((network(images, "dense").logits.argmax(1) == labels).sum())
            if static is not None:
                right_parent += int((static(images, "dense").logits.argmax(1) == labels).sum())
    recorded = {record.id: record.flops_clean for record in read_records(folder / "records.csv")}
    # Another machine's rounding moves a gate here and there; other weights move the mean.
    if flops.keys() != recorded.keys() or not math.isclose(sum(flops.values()), sum(recorded.values()), rel_tol=1e-3):
        raise SystemExit(f"{folder} holds records of other images or weights; remove it, or choose another --out")
    ran = torch.cat(executed)
    found: dict[str, Any] = {"accuracy_dense": right / len(ran), "gates_varying": (ran.amin(0) != ran.amax(0)).double().mean().item()}
    if parent is not None:
        found |= {"accuracy_parent": right_parent / len(ran), "parent": find_checkpoint(parent).stem}
    (folder / "dense.json").write_text(json.dumps(compared(folder) | found) + "\n")


def compared(folder: Path) -> dict[str, Any]:
    """What dense.json holds; empty where there is none."""
    path = folder / "dense.json"
    return json.loads(path.read_text()) if path.exists() else {}


def row(folder: Path) -> list[str]:
    """One line of the table, from the files alone."""
    summary, found = json.loads((folder / "summary.json").read_text()), compared(folder)
    static = "parent" if "accuracy_parent" in found else "dense"
    records = read_records(folder / "records.csv")
    shares = torch.tensor([record.flops_clean / record.flops_dense for record in records], dtype=torch.float64)
    recovery, rounded = summary["recovery_percent"], summary["recovery_8bit_percent"]
    return [
        f"`{folder.name}`",
        f"{100 * summary['accuracy_clean']:.1f} %",
        f"{100 * found[f'accuracy_{static}']:.1f} % ({static})",
        f"{100 * shares.mean():.1f} % of {summary['flops_dense'] / 1e6:.2f}M",
        f"{100 * summary['flops_clean_std'] / summary['flops_dense']:.1f} %",
        f"{100 * (shares == 1).double().mean():.1f} %",
        str(len(shares.unique())),
        f"{100 * found['gates_varying']:.1f} %" if "gates_varying" in found else "-",
        f"{summary['attack']['steps']} steps, gamma {summary['attack']['gamma']:g}",
        "-" if recovery is None else f"{recovery:.1f} %",
        f"{summary['psnr_db']:.1f} dB",
        "-" if rounded is None else f"{rounded:.1f} %",
        f"{100 * summary['accuracy_adversarial']:.1f} %",
        str(len(records)),
    ]


def render(out: Path) -> str:
    """The page of all records in a folder."""
    rows = [row(folder) for folder in sorted(out.iterdir()) if (folder / "dense.json").exists()]
    text = [
        "# Checkpoints of all families",
        "",
        "Rendered by `python benchmarks/families.py` from the records beside this page. *Static* is the accuracy of the static counterpart on the",
        "same images: of the *parent* that the weights started from, where it was measured (`--parents`), else of the same weights with every gate",
        "open, *dense* (ManiDP's and SACT's say little: it is another function). FLOPs are MACs; *sd* and *at full* are over images, *routes'",
        "FLOPs* counts different FLOPs. *Gates that vary* is the share of gate units neither open for all of these images nor closed for all of",
        "them, - where it was not measured. Recovery is that of GradMDM with the steps and gamma beside it; images and attack differ between rows.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    return "\n".join(text) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoints", nargs="+", default=None, help="default: all that ship")
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--gamma", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--precision", default="32-true", help="of crafting, such as bf16-mixed; figures are taken in float32 in any case")
    parser.add_argument("--parents", nargs="+", default=[], metavar="FILE", help="static parents of these checkpoints, and the stages between")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families"))
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    names = options.checkpoints or shipped("checkpoints", ".safetensors")
    parents = parents_of(names, options.parents)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        folder = options.out / find_checkpoint(name).stem
        attacked, wanted = (folder / "summary.json").exists(), {"accuracy_dense", "gates_varying", *(["accuracy_parent"] if name in parents else [])}
        if attacked and wanted <= compared(folder).keys():
            continue
        images = json.loads((folder / "summary.json").read_text())["images"] if attacked else options.images
        data = data_of(name, options.data, images)
        if data is None:
            print(f"{name}: left out, its images need --data FOLDER")
            continue
        if not attacked:
            run_attack(load(name), name, GradMDM(gamma=options.gamma, steps=options.steps), data, emptied(folder), options.precision)
        compare(name, data, parents.get(name), folder)
        print(" | ".join(row(folder)), flush=True)
    (options.out / "FAMILIES.md").write_text(render(options.out))


if __name__ == "__main__":
    main()
