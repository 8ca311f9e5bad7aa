"""The trained network as a checkpoint file of its own: safetensors and card."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses

from gatewatt.callbacks.records import versions
from gatewatt.defenses import bare, described
from gatewatt.networks.checkpoint import save
from gatewatt.tasks.base import NetworkTask


class ExportCheckpoint(L.Callback):
    """Write ``<name>.safetensors`` and its card into the run's folder when training is over.

    The card holds the resolved recipe, data, seed, commit, versions and the last validation's figures; figures on test images are added by
    ``gatewatt test`` (see :class:`~gatewatt.callbacks.ResultFiles`).

    Args:
        name: file name without suffix, ``<network>-<size>-<dataset>[-robust]``.
    """

    def __init__(self, name: str) -> None:
        if not name or "/" in name or name.endswith(".safetensors"):
            raise ValueError(f"name must be a plain file name without suffix, such as skipnet-38-cifar10, got {name!r}")
        self.name = name

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files, by the first process."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, NetworkTask)
        folder = Path(trainer.default_root_dir)
        recipe = folder / "recipe.yaml"
        data = getattr(trainer, "datamodule", None)
        card = {
            "recipe": recipe.read_text(encoding="utf-8") if recipe.exists() else None,
            "dataset": getattr(data, "name", None),
            "seed": getattr(data, "seed", None),
            "epochs": trainer.current_epoch,
            "commit": commit(),
            "versions": versions(),
            "license": "MIT",
            "validation": validation_figures(trainer),
            # A file holds the network inside; behind the same defense it is again what was trained.
            "defense": described(pl_module.network),
        }
        save(bare(pl_module.network), folder / f"{self.name}.safetensors", card=card)
        print(f"wrote {folder / self.name}.safetensors and its card")


def validation_figures(trainer: L.Trainer) -> dict[str, float | None]:
    """What the last validation logged; None for what is undefined, such as the recovery of a network whose gates are all open."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {name: value if math.isfinite(value) else None for name, value in logged.items()}


def commit() -> str | None:
    """The commit of the source tree this package runs from, or None where it was installed from a wheel."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
