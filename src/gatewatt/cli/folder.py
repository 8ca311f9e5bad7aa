"""A run's folder: its name, who may have it, and what is kept in it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import yaml
from lightning.pytorch.utilities import rank_zero_only

from gatewatt.callbacks import ExportCheckpoint
from gatewatt.cli.resume import RECORD, record, recorded, say
from gatewatt.files import sweep, write_text

FOLDER_VARIABLE = "GATEWATT_RUN_FOLDER"  # tells the processes that Lightning starts which folder the first one reserved


def process_rank() -> int:
    """Rank of this process as Lightning learned it from the environment, before any process group exists."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


def run_path(name: str) -> Path:
    """The folder that a run's name means: ``runs/<name>``, or a path such as ``results/first`` as it is."""
    return Path(name) if len(Path(name).parts) > 1 else Path("runs") / name


def reserve_folder(name: str) -> Path:
    """Make ``runs/<name>``, or ``runs/<name>-2`` and so on: a folder that no other run has.

    Args:
        name: a name, or a path such as ``results/first`` that is used as it is.
    """
    wanted = run_path(name)
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            # Two runs that start together cannot both make it.
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def recipe_of(folder: Path) -> dict[str, Any] | None:
    """The resolved recipe in a run's folder, or None."""
    try:
        settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None


def field(settings: Any, key: str) -> Any:
    """The value at a dotted key of a document, or None."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def identity(settings: dict[str, Any]) -> tuple[Any, Any]:
    """What makes two recipes recipes of one run: its task and its network."""
    return field(settings, "model.class_path"), field(settings, "model.init_args.network")


def clear_leftovers(folder: Path, callbacks: Sequence[L.Callback], data: L.LightningDataModule | None) -> None:
    """Remove from the folder of a run that is resumed on ``data`` what its killed predecessor left half done."""
    sweep(folder)
    # It says that the run is complete, which it no longer is.
    (folder / "result.json").unlink(missing_ok=True)
    for callback in callbacks:
        if isinstance(callback, ExportCheckpoint):
            # Written when training was over, just before the kill; the resumed run writes them once more.
            for suffix in (".safetensors", ".json"):
                (folder / f"{callback.file_name(data)}{suffix}").unlink(missing_ok=True)


class RunFolder(L.Callback):
    """Keeps the resolved recipe in the run's folder and in every checkpoint, and makes every process agree on which folder that is.

    Args:
        folder: the run's folder, reserved by the first process.
        recipe: the resolved recipe, as YAML.
    """

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder, self.recipe = folder, recipe

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Share the folder and write ``recipe.yaml``."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        # Under torchrun all processes start at once, so only now can the others learn what the first one reserved.
        trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            write_text(self.folder / "recipe.yaml", self.recipe)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down which network, settings and number of processes the checkpoint belongs to."""
        checkpoint[RECORD] = record(pl_module, yaml.safe_load(self.recipe), trainer.world_size)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say so if training goes on with another number of processes: they share the rest of the epoch out in another way."""
        before = recorded(checkpoint).get("processes", trainer.world_size)
        if trainer.state.fn == "fit" and trainer.is_global_zero and before != trainer.world_size:
            say(
                f"going on with {trainer.world_size} instead of {before} processes: another batch and learning rate in effect, and in the epoch at "
                "work some images come up twice or not at all"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that is longer than the schedule that came with its checkpoint."""
        steps = trainer.estimated_stepping_batches
        for config in trainer.lr_scheduler_configs:
            planned = getattr(config.scheduler, "T_max", None) or getattr(config.scheduler, "total_steps", 0) - 1
            if 0 < planned < steps:
                raise ValueError(
                    f"the learning-rate schedule of the checkpoint ends after {planned} steps, this run has {steps}; "
                    "keep the length, or start a new run from the weights with model.checkpoint"
                )
