"""A few images of a row, kept as they are, for a figure: clean and adversarial pixels and what each cost."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import numpy as np
import torch

from gatewatt.data.batch import Batch
from gatewatt.files import write_atomically
from gatewatt.reports.plots import STRIP_FILE
from gatewatt.tasks.attack import Attacked, EnergyAttackEvaluation


class ImageStrip(L.Callback):
    """Write the images of a prediction, in float, as one ``strip.npz`` into the run's folder; for a handful of images on one process."""

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from nothing."""
        self.parts: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Attacked, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a batch."""
        assert isinstance(pl_module, EnergyAttackEvaluation)
        attacked = pl_module.measure(outputs.adversarial)
        columns = {
            "ids": outputs.batch.ids,
            "clean": outputs.batch.images,
            "adversarial": outputs.adversarial,
            "flops_clean": outputs.clean.flops,
            "flops_adversarial": attacked.flops,
            "flops_dense": torch.full_like(attacked.flops, pl_module.ledger.dense),
        }
        self.parts.append({name: column.detach().cpu().numpy() for name, column in columns.items()})

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        content = io.BytesIO()
        columns: dict[str, Any] = {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
        np.savez(content, **columns)
        write_atomically(Path(trainer.default_root_dir) / STRIP_FILE, content.getvalue())
