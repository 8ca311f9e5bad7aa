"""Attack a fixed subset during validation, and show at the end of training what the epochs bought."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from torch import Tensor

from gatewatt.attacks import Attack, GradMDM
from gatewatt.callbacks.console import mflops, percent, print_table
from gatewatt.data.batch import Batch
from gatewatt.data.loader import evaluated_ids
from gatewatt.defenses import bare, described
from gatewatt.gating import DynamicNetwork, measuring_execution
from gatewatt.metrics import MeanFlops, RecoveryPercent
from gatewatt.metrics.distortion import mse_levels2, round_to_8bit
from gatewatt.metrics.record import psnr_of_mse
from gatewatt.tasks.base import NetworkTask
from gatewatt.tasks.defend import EnergyAdversarialTraining
from gatewatt.tasks.evaluate import full_precision

LOGGED = ("recovery_percent", "recovery_8bit_percent", "flops_adversarial", "mse_levels2")


class RecoveryCallback(L.Callback):
    """Measure the FLOPs that an attack recovers, in every ``every``-th validation.

    The images are the first ones of the validation order: the same in every epoch, on any number of processes. Logged:
    ``val/recovery_percent``, ``val/recovery_8bit_percent``, ``val/flops_adversarial`` (MACs) and ``val/mse_levels2``.

    Args:
        attack: the attack (default: GradMDM).
        images: how many images of the validation set.
        every: attack in every n-th validation; the last epoch is always measured.

    Raises:
        ValueError: if ``images`` or ``every`` is below 1.
    """

    def __init__(self, attack: Attack | None = None, *, images: int = 128, every: int = 1) -> None:
        if images < 1 or every < 1:
            raise ValueError(f"images and every must be at least 1, got {images} and {every}")
        self.attack, self.images, self.every = attack or GradMDM(), images, every
        self.history: list[dict[str, Any]] = []
        self.due = False

    def state_dict(self) -> dict[str, Any]:
        """The epochs measured so far, so that a resumed run shows them too."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the epochs of the interrupted run."""
        self.history = state_dict["history"]

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from zero."""
        last = trainer.max_epochs is not None and trainer.current_epoch == trainer.max_epochs - 1
        self.due = not trainer.sanity_checking and (last or (trainer.current_epoch + 1) % self.every == 0)
        self.recovery, self.recovery_8bit = (RecoveryPercent().to(pl_module.device) for _ in range(2))
        self.adversarial, self.error = (MeanFlops().to(pl_module.device) for _ in range(2))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Attack those images of the batch that belong to the subset."""
        assert isinstance(pl_module, NetworkTask)
        chosen = self._chosen(trainer, batch)
        if not self.due or not bool(chosen.any()):
            return
        images, labels = batch.images[chosen], batch.labels[chosen]
        network, ledger = pl_module.network, pl_module.ledger
        execution = measuring_execution(network)
        adversarial = self.attack(network, images, labels, ledger=ledger).images
        with full_precision(), torch.no_grad():
            clean, attacked, rounded = (
                ledger(network(version.contiguous(memory_format=pl_module.memory_format), execution).gates)
                for version in (images, adversarial, round_to_8bit(adversarial))
            )
        self.recovery.update(clean, attacked, ledger.dense)
        self.recovery_8bit.update(clean, rounded, ledger.dense)
        self.adversarial.update(attacked)
        self.error.update(mse_levels2(images, adversarial))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the epoch; the metrics are sums over all processes."""
        if not self.due:
            return
        figures = dict(zip(LOGGED, (self.recovery, self.recovery_8bit, self.adversarial, self.error), strict=True))
        values = {f"val/{name}": metric.compute() for name, metric in figures.items()}
        pl_module.log_dict(values, prog_bar=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the epoch for the final table, once the task has logged its own figures."""
        if self.due:
            logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            attacked = isinstance(pl_module, EnergyAdversarialTraining) and not pl_module.warming
            self.history.append({"epoch": trainer.current_epoch, "phase": "energy-adversarial" if attacked else "clean", **logged})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the table of all epochs measured."""
        if not trainer.is_global_zero or not self.history:
            return
        assert isinstance(pl_module, NetworkTask)
        # Not the ledger's: a run that was killed after its last step is resumed with nothing to do, and prices nothing.
        dense = self.history[-1]["val/flops_clean"] / self.history[-1]["val/flops_fraction"]
        rows = []
        for row in self.history:
            phase = f" ({row['phase']})" if "phase" in row else ""  # a run begun with an earlier version kept none
            mse = row["val/mse_levels2"]
            rows.append(
                [
                    f"{int(row['epoch']) + 1}{phase}",
                    percent(row["val/accuracy"]),
                    mflops(row["val/flops_clean"]),
                    percent(row["val/flops_fraction"]),
                    mflops(row["val/flops_adversarial"]),
                    f"{row['val/recovery_percent']:.1f} %",
                    f"{row['val/recovery_8bit_percent']:.1f} %",
                    f"{psnr_of_mse(mse):.1f}",
                ]
            )
        print_table(
            f"{title(pl_module.network)} under {self.attack} (dense {mflops(dense)})",
            ["after epoch", "accuracy", "FLOPs clean", "of dense", "FLOPs adversarial", "recovery", "recovery 8-bit", "PSNR dB"],
            rows,
            caption=f"1 MAC = 1 FLOP. Accuracy and clean FLOPs over the validation set; the attack over its first {self.images} images.",
        )

    def _chosen(self, trainer: L.Trainer, batch: Batch) -> Tensor:
        first = torch.tensor(evaluated_ids(trainer.val_dataloaders)[: self.images], device=batch.ids.device)
        return torch.isin(batch.ids, first)


def title(network: DynamicNetwork) -> str:
    """A network by its class, and by what stands before it."""
    name, defense = type(bare(network)).__name__, described(network)
    return f"{name} behind {defense['name']}" if defense else name
