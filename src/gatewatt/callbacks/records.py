"""Result files of an attack: records.csv (one row per image), summary.json, and the table on the terminal."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch.distributed

from gatewatt import __version__
from gatewatt.callbacks.console import mflops, percent, print_table
from gatewatt.data.loader import evaluated_ids
from gatewatt.metrics.record import merge_records, summarize, write_records, write_summary
from gatewatt.networks.checkpoint import amend_card
from gatewatt.tasks.attack import EnergyAttackEvaluation

CARD_KEYS = (
    "dataset",
    "images",
    "attack",
    "accuracy_clean",
    "flops_dense",
    "flops_clean",
    "flops_clean_std",
    "images_at_full_flops",
    "recovery_percent",
    "recovery_8bit_percent",
    "psnr_db",
    "accuracy_adversarial",
)
"""What of a summary a checkpoint's card repeats."""
PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "fvcore")


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    return {"python": platform.python_version(), "gatewatt": __version__, **{package: version(package) for package in PACKAGES}}


class ResultFiles(L.Callback):
    """Write ``summary.json`` and ``records.csv`` into the run's folder after a test, and print the figures.

    Rows of all processes are merged by image id. Nothing is overwritten: a second test of the same run goes to another folder.

    Args:
        into_card: also write the figures into the card of the checkpoint under test, for checkpoints that are to be shipped.
    """

    def __init__(self, *, into_card: bool = False) -> None:
        self.into_card = into_card

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what could only fail after hours of attacking."""
        assert isinstance(pl_module, EnergyAttackEvaluation)
        if self.into_card and pl_module.checkpoint is None:
            raise ValueError("into_card needs a checkpoint under test; give model.init_args.checkpoint")
        for file in (Path(trainer.default_root_dir) / name for name in ("records.csv", "summary.json")):
            if file.exists():
                raise FileExistsError(f"{file} exists already and results are never overwritten: choose another run folder")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge, write, print."""
        assert isinstance(pl_module, EnergyAttackEvaluation)
        parts: list[Any] = [pl_module.rows]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, pl_module.rows)
        # Processes attack at the same time: the slowest one's time is the attack's.
        seconds = float(trainer.strategy.reduce(torch.tensor(pl_module.attack_seconds), reduce_op="max"))
        if not trainer.is_global_zero:
            return
        # The first process has the most batches, and no other has more than it is limited to.
        rows = merge_records(parts, evaluated_ids(trainer.test_dataloaders, int(trainer.num_test_batches[0]) * trainer.world_size))
        data = getattr(trainer, "datamodule", None)
        folder = Path(trainer.default_root_dir)
        summary = summarize(
            rows,
            **pl_module.describe(),
            dataset=getattr(data, "name", None),
            seed=getattr(data, "seed", None),
            wall_seconds=seconds,
            versions=versions(),
            recipe="recipe.yaml" if (folder / "recipe.yaml").exists() else None,
        )
        write_records(folder / "records.csv", rows)
        written = json.loads(write_summary(folder / "summary.json", summary).read_text(encoding="utf-8"))
        show(summary)
        if self.into_card:
            assert pl_module.checkpoint is not None
            # As the file has it: what is undefined is null there, which a card can hold.
            amend_card(pl_module.checkpoint, measured={key: written[key] for key in CARD_KEYS})
        print(f"wrote {folder / 'summary.json'} and {folder / 'records.csv'}")


def points(recovery: float, more: str = "") -> str:
    """A recovery in percent, and what there is to say of it.

    Example:
        >>> points(12.34, " (n = 5)"), points(float("nan"), " (n = 5)")
        ('12.3 % (n = 5)', 'undefined: clean images run everything')
    """
    return "undefined: clean images run everything" if math.isnan(recovery) else f"{recovery:.1f} %{more}"


def show(summary: dict[str, Any]) -> None:
    """Print the figures of a summary."""
    low, high = summary["recovery_percent_interval"]
    rows = [
        ["images", str(summary["images"])],
        ["accuracy, clean", percent(summary["accuracy_clean"])],
        ["accuracy, adversarial", percent(summary["accuracy_adversarial"])],
        ["FLOPs, dense", mflops(summary["flops_dense"])],
        ["FLOPs, clean", f"{mflops(summary['flops_clean'])} ({percent(summary['flops_clean'] / summary['flops_dense'])} of dense)"],
        ["FLOPs, adversarial", f"{mflops(summary['flops_adversarial'])} ({percent(summary['flops_adversarial'] / summary['flops_dense'])} of dense)"],
        ["recovery", points(summary["recovery_percent"], f" (95 %: {low:.1f} to {high:.1f})")],
        ["recovery, mean over images", points(summary["recovery_per_image_percent"], f" ({summary['images_at_full_flops']} at full FLOPs left out)")],
        ["recovery after 8-bit rounding", points(summary["recovery_8bit_percent"])],
        ["MSE", f"{summary['mse_levels2']:.3f} levels squared"],
        ["PSNR", f"{summary['psnr_db']:.1f} dB (of the mean MSE: {summary['psnr_db_of_mean_mse']:.1f} dB)"],
        ["largest change of a pixel", f"{summary['linf_levels']:.1f} levels"],
        ["speed", f"{summary['images_per_second']:.2f} images per second"],
    ]
    attack = summary["attack"]
    # A penalised attack has a gamma, one within a ball a radius, noise no steps.
    strength = [f"{name} {value:g}" for name, value in (("gamma", attack.get("gamma")), ("eps", radius(attack))) if value is not None]
    strength += [f"{attack['steps']} steps"] if "steps" in attack else []
    title = f"{summary['network']['name']} on {summary['dataset']} under {attack['name']} ({', '.join(strength)})"
    print_table(title, ["figure", "value"], rows, caption="1 MAC = 1 FLOP, means per image; recovery is the ratio of sums; levels are 8-bit.")


def radius(attack: Mapping[str, Any]) -> float | None:
    """Radius of the ball that an attack's settings name, on the [0, 1] scale; None without a ball."""
    return attack.get("eps", attack.get("space", {}).get("eps"))
