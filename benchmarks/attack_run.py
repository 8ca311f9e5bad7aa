"""One attack on one network, recorded as `gatewatt test` records it: what several benchmarks are made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses

from gatewatt.attacks import Attack
from gatewatt.callbacks import ResultFiles
from gatewatt.data import ImageData
from gatewatt.gating import DynamicNetwork
from gatewatt.tasks import EnergyAttackEvaluation


def emptied(folder: Path) -> Path:
    """The folder of a run that has to be made, empty: records without a summary are those of a run that was interrupted between the two."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_attack(network: DynamicNetwork, checkpoint: str, attack: Attack, data: ImageData, folder: Path, precision: Any = "32-true") -> float:
    """Attack the test images: summary.json and records.csv in the folder.

    Args:
        network: under attack.
        checkpoint: whose weights it has, as the summary is to say.
        attack: with its settings.
        data: whose test images it gets.
        folder: of the run; it exists.
        precision: of crafting, as Lightning spells it; figures are taken in float32 in any case.

    Returns:
        The seconds that crafting took.
    """
    task = EnergyAttackEvaluation(network, attack)
    task.checkpoint = checkpoint
    silent: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="auto", devices=1, precision=precision, callbacks=[ResultFiles()], default_root_dir=folder, **silent)
    trainer.test(task, data, verbose=False)
    return task.attack_seconds
