"""Optimiser and schedule as plain values, so that a recipe can state both and needs no callable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn, optim


class Optimization:
    """An optimiser with a per-step learning-rate schedule.

    Args:
        optimizer: ``sgd`` or ``adamw``.
        lr: peak learning rate, positive.
        momentum: of SGD; the first beta of AdamW.
        weight_decay: at least 0, on every parameter.
        nesterov: Nesterov momentum of SGD.
        schedule: ``one_cycle`` (cosine up and down), ``step`` (times 0.1 at each milestone), ``cosine`` (down to 0) or ``constant``.
        warmup: fraction of the run that ``one_cycle`` spends rising.
        milestones: fractions of the run at which ``step`` drops; (0.5, 0.75) is SkipNet's 32k and 48k of 64k.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    def __init__(
        self,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        schedule: Literal["one_cycle", "step", "cosine", "constant"] = "step",
        warmup: float = 0.3,
        milestones: Sequence[float] = (0.5, 0.75),
    ) -> None:
        if optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be sgd or adamw, got {optimizer!r}")
        if schedule not in ("one_cycle", "step", "cosine", "constant"):
            raise ValueError(f"schedule must be one_cycle, step, cosine or constant, got {schedule!r}")
        if not lr > 0 or not 0 <= momentum < 1 or not weight_decay >= 0:
            raise ValueError(f"lr must be positive, momentum in [0, 1), weight_decay at least 0, got {lr}, {momentum}, {weight_decay}")
        if not 0 <= warmup < 1 or any(not 0 < milestone < 1 for milestone in milestones):
            raise ValueError(f"warmup must be in [0, 1) and milestones in (0, 1), fractions of the run, got {warmup} and {tuple(milestones)}")
        self.optimizer, self.lr, self.momentum, self.weight_decay, self.nesterov = optimizer, lr, momentum, weight_decay, nesterov
        # torch's one-cycle schedule refuses the integer 0.
        self.schedule, self.warmup, self.milestones = schedule, float(warmup), tuple(milestones)

    def configure(self, parameters: Iterable[nn.Parameter], total_steps: int) -> OptimizerLRSchedulerConfig:
        """The dictionary that Lightning's ``configure_optimizers`` returns.

        Args:
            parameters: what to train.
            total_steps: optimiser steps of the whole run.
        """
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        optimizer: optim.Optimizer
        if self.optimizer == "sgd":
            optimizer = optim.SGD(trained, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov)
        else:
            optimizer = optim.AdamW(trained, self.lr, (self.momentum, 0.999), weight_decay=self.weight_decay)
        scheduler: optim.lr_scheduler.LRScheduler
        if self.schedule == "one_cycle":
            scheduler = optim.lr_scheduler.OneCycleLR(
                optimizer, self.lr, total_steps=total_steps + 1, pct_start=self._rising(total_steps + 1), cycle_momentum=False
            )
        elif self.schedule == "cosine":
            scheduler = optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
        else:
            drops = [round(milestone * total_steps) for milestone in self.milestones] if self.schedule == "step" else []
            scheduler = optim.lr_scheduler.MultiStepLR(optimizer, drops)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rising(self, steps: int) -> float:
        """The fraction of the run that rises. Where that is one step exactly, torch divides by the zero steps in between: start at the peak."""
        return 0.0 if abs(self.warmup * steps - 1) < 1e-6 else self.warmup
