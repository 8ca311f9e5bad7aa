"""Adversarial images as PNG files, and what of the attack survives the saving."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gatewatt.callbacks.console import mflops, percent, print_table
from gatewatt.data.batch import Batch
from gatewatt.metrics import MeanFlops, RecoveryPercent
from gatewatt.metrics.distortion import mse_levels2
from gatewatt.metrics.record import psnr_of_mse
from gatewatt.tasks.attack import Attacked, EnergyAttackEvaluation


class AdversarialPNGs(L.Callback):
    """Write every adversarial image of a prediction as ``images/<id>.png`` in the run's folder, and attack the network with the files.

    The second measurement reads the files back, so it says what a victim who is sent the PNG would spend.
    """

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the folder and start from zero."""
        self.folder = Path(trainer.default_root_dir) / "images"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recovery, self.recovery_saved = (RecoveryPercent().to(pl_module.device) for _ in range(2))
        self.error, self.error_saved = (MeanFlops().to(pl_module.device) for _ in range(2))
        self.correct = torch.zeros(3, dtype=torch.float64)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Attacked, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Write a batch and measure it from its files.

        Raises:
            FileExistsError: if an image of that name is there already.
        """
        assert isinstance(pl_module, EnergyAttackEvaluation)
        saved = torch.stack([self._round_trip(int(index), image) for index, image in zip(batch.ids, outputs.adversarial, strict=True)])
        saved = saved.to(batch.images.device)
        floats, files = pl_module.measure(outputs.adversarial), pl_module.measure(saved)
        dense = pl_module.ledger.dense
        self.recovery.update(outputs.clean.flops, floats.flops, dense)
        self.recovery_saved.update(outputs.clean.flops, files.flops, dense)
        self.error.update(mse_levels2(batch.images, outputs.adversarial))
        self.error_saved.update(mse_levels2(batch.images, saved))
        predictions = torch.stack([outputs.clean.prediction, floats.prediction, files.prediction])
        self.correct += (predictions == batch.labels).sum(1).cpu()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what survived."""
        assert isinstance(pl_module, EnergyAttackEvaluation)
        totals, totals_saved = self.recovery.totals(), self.recovery_saved.totals()
        errors = [float(metric.compute()) for metric in (self.error, self.error_saved)]
        correct = trainer.strategy.reduce(self.correct, reduce_op="sum") / totals.images
        if not trainer.is_global_zero:
            return
        rows = [
            [label, f"{recovered.recovery_percent:.1f} %", f"{error:.3f}", f"{psnr_of_mse(error):.1f}", percent(float(right))]
            for label, recovered, error, right in (
                ("float", totals, errors[0], correct[1]),
                ("read back from PNG", totals_saved, errors[1], correct[2]),
            )
        ]
        columns = ["adversarial image", "recovery", "MSE (levels squared)", "PSNR dB", "accuracy"]
        caption = f"{totals.images} images in {self.folder}; clean accuracy {percent(float(correct[0]))}, dense {mflops(pl_module.ledger.dense)}."
        print_table(f"What of {pl_module.attack} survives the saving", columns, rows, caption=caption)

    def _round_trip(self, index: int, image: Tensor) -> Tensor:
        path = self.folder / f"{index:06d}.png"
        if path.exists():
            raise FileExistsError(f"{path} is there already; choose another run folder")
        levels = (image.cpu() * 255).round().to(torch.uint8)
        Image.fromarray(levels.permute(1, 2, 0).numpy()).save(path)
        with Image.open(path) as saved:
            return torch.from_numpy(np.array(saved.convert("RGB"))).permute(2, 0, 1).float() / 255
