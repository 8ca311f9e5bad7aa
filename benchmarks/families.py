"""One table over checkpoints of all families: accuracy, what the gates save, and what GradMDM takes back.

    python benchmarks/families.py [--checkpoints NAME ...] [--data FOLDER] [--images 1000] [--gamma 100] [--steps 100]

Every checkpoint leaves summary.json, records.csv and dense.json in benchmarks/results/families/<name>; one that is there already is not measured
again. The table is rendered from these files. FOLDER holds test/<class>/* of CIFAR-10, for checkpoints trained on it; digits are embedded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch

from gatewatt import load
from gatewatt.attacks import GradMDM
from gatewatt.callbacks import ResultFiles
from gatewatt.data import DigitsData, FolderData, ImageData
from gatewatt.metrics.record import read_records
from gatewatt.networks.checkpoint import card_of
from gatewatt.shipped import shipped
from gatewatt.tasks import EnergyAttackEvaluation

COLUMNS = ("checkpoint", "accuracy", "dense", "FLOPs", "sd", "at full", "routes' FLOPs", "recovery", "PSNR", "8-bit", "attacked", "images")


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


def measure(name: str, data: ImageData, attack: GradMDM, folder: Path) -> None:
    """Attack the test images, and count how many the static counterpart gets right."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    network = load(name)
    task = EnergyAttackEvaluation(network, attack)
    task.checkpoint = name
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(accelerator="cpu", devices=1, callbacks=[ResultFiles()], default_root_dir=folder, **quiet).test(task, data, verbose=False)
    right = total = 0
    with torch.no_grad():
        for batch in data.test_dataloader():
            right += int((network(batch.images, "dense").logits.argmax(1) == batch.labels).sum())
            total += len(batch.labels)
    (folder / "dense.json").write_text(json.dumps({"accuracy_dense": right / total}) + "\n")


def row(folder: Path) -> list[str]:
    """One line of the table, from the files alone."""
    summary = json.loads((folder / "summary.json").read_text())
    dense = json.loads((folder / "dense.json").read_text())["accuracy_dense"]
    records = read_records(folder / "records.csv")
    shares = torch.tensor([record.flops_clean / record.flops_dense for record in records], dtype=torch.float64)
    recovery, rounded = summary["recovery_percent"], summary["recovery_8bit_percent"]
    return [
        f"`{folder.name}`",
        f"{100 * summary['accuracy_clean']:.1f} %",
        f"{100 * dense:.1f} %",
        f"{100 * shares.mean():.1f} % of {summary['flops_dense'] / 1e6:.2f}M",
        f"{100 * summary['flops_clean_std'] / summary['flops_dense']:.1f} %",
        f"{100 * (shares == 1).double().mean():.1f} %",
        str(len(shares.unique())),
        "-" if recovery is None else f"{recovery:.1f} %",
        f"{summary['psnr_db']:.1f} dB",
        "-" if rounded is None else f"{rounded:.1f} %",
        f"{100 * summary['accuracy_adversarial']:.1f} %",
        str(len(records)),
    ]


def main() -> None:
    """Measure what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", default=None, help="default: all that ship")
    parser.add_argument("--data", default=None)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--gamma", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/families"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    for name in options.checkpoints or shipped("checkpoints", ".safetensors"):
        folder, data = options.out / name, data_of(name, options.data, options.images)
        if data is not None and not (folder / "dense.json").exists():
            measure(name, data, GradMDM(gamma=options.gamma, steps=options.steps), folder)
            print(" | ".join(row(folder)), flush=True)
    rows = [row(folder) for folder in sorted(options.out.iterdir()) if (folder / "dense.json").exists()]
    text = [
        "# Checkpoints of all families",
        "",
        "Rendered by `python benchmarks/families.py` from the records beside this page. *Dense* is the accuracy of the same weights with every",
        "gate open (ManiDP's and SACT's say little: it is another function). FLOPs are MACs; *sd* and *at full* are over images, *routes' FLOPs*",
        "counts different FLOPs. Recovery is that of GradMDM as each summary says; images and attack differ between rows where summaries do.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|" + "--:|" * (len(COLUMNS) - 1),
        *("| " + " | ".join(cells) + " |" for cells in rows),
    ]
    (options.out / "FAMILIES.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
