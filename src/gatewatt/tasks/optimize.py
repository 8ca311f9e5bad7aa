"""Optimiser and schedule as plain values, so that a recipe can state both and needs no callable."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn, optim
from torch.optim import lr_scheduler

VECTORS = "vectors"
START = 1e-3  # share of the peak at which the linear rise begins
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("one_cycle", "step", "cosine", "warmup_cosine", "constant")


class Optimization:
    """An optimiser with a per-step learning-rate schedule.

    Args:
        optimizer: ``sgd``, ``adam`` or ``adamw``.
        lr: peak learning rate, positive.
        momentum: of SGD; the first beta of Adam and AdamW.
        weight_decay: at least 0; decoupled from the gradient in AdamW alone.
        no_decay: parameters without weight decay: ``vectors`` for all of one dimension (norms, biases), else patterns of names as a shell's, such
            as ``*.mask?.*``; by default none is left out.
        nesterov: Nesterov momentum of SGD.
        schedule: ``one_cycle`` (cosine up and down), ``step`` (times 0.1 at each milestone), ``cosine`` (down to ``final_lr``),
            ``warmup_cosine`` (the same after a linear rise from lr / 1000) or ``constant``.
        warmup: fraction of the run that ``one_cycle`` and ``warmup_cosine`` spend rising.
        milestones: fractions of the run at which ``step`` drops; (0.5, 0.75) is SkipNet's 32k and 48k of 64k.
        final_lr: where ``cosine`` and ``warmup_cosine`` end, below ``lr``.

    Raises:
        ValueError: for an unknown name or a value out of range.
    """

    def __init__(
        self,
        optimizer: Literal["sgd", "adam", "adamw"] = "sgd",
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        no_decay: Sequence[str] = (),
        nesterov: bool = False,
        schedule: Literal["one_cycle", "step", "cosine", "warmup_cosine", "constant"] = "step",
        warmup: float = 0.3,
        milestones: Sequence[float] = (0.5, 0.75),
        final_lr: float = 0.0,
    ) -> None:
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if not lr > 0 or not 0 <= momentum < 1 or not weight_decay >= 0:
            raise ValueError(f"lr must be positive, momentum in [0, 1), weight_decay at least 0, got {lr}, {momentum}, {weight_decay}")
        if not 0 <= final_lr < lr:
            raise ValueError(f"final_lr must be at least 0 and below lr {lr}, got {final_lr}")
        if not 0 <= warmup < 1 or any(not 0 < milestone < 1 for milestone in milestones):
            raise ValueError(f"warmup must be in [0, 1) and milestones in (0, 1), fractions of the run, got {warmup} and {tuple(milestones)}")
        self.optimizer, self.lr, self.momentum, self.weight_decay, self.nesterov = optimizer, lr, momentum, weight_decay, nesterov
        # torch's one-cycle schedule refuses the integer 0.
        self.schedule, self.warmup, self.milestones, self.final_lr = schedule, float(warmup), tuple(milestones), final_lr
        self.no_decay = tuple(no_decay)

    def configure(self, network: nn.Module, total_steps: int) -> OptimizerLRSchedulerConfig:
        """The dictionary that Lightning's ``configure_optimizers`` returns.

        Args:
            network: what to train; its frozen parameters are left out.
            total_steps: optimiser steps of the whole run.

        Raises:
            ValueError: if a pattern of ``no_decay`` names no parameter.
        """
        optimizer = self._optimizer(self.groups(network))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._scheduler(optimizer, total_steps), "interval": "step"}}

    def groups(self, network: nn.Module) -> list[dict[str, Any]]:
        """The trained parameters, and those of them without weight decay as a group of their own.

        Example:
            >>> network = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
            >>> [len(group["params"]) for group in Optimization(no_decay=["vectors"]).groups(network)]
            [1, 3]
        """
        named = dict(network.named_parameters())
        for pattern in self.no_decay:
            if pattern != VECTORS and not any(fnmatchcase(name, pattern) for name in named):
                raise ValueError(f"no_decay: no parameter of {type(network).__name__} is named {pattern!r}; one is {next(iter(named))!r}")

        def spared(name: str, parameter: nn.Parameter) -> bool:
            return any(parameter.ndim <= 1 if pattern == VECTORS else fnmatchcase(name, pattern) for pattern in self.no_decay)

        trained = [(spared(name, parameter), parameter) for name, parameter in named.items() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": [parameter for out, parameter in trained if not out]}]
        if self.no_decay:
            groups.append({"params": [parameter for out, parameter in trained if out], "weight_decay": 0.0})
        return groups

    def _optimizer(self, groups: list[dict[str, Any]]) -> optim.Optimizer:
        if self.optimizer == "sgd":
            return optim.SGD(groups, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov)
        adam = optim.Adam if self.optimizer == "adam" else optim.AdamW
        return adam(groups, self.lr, (self.momentum, 0.999), weight_decay=self.weight_decay)

    def _scheduler(self, optimizer: optim.Optimizer, steps: int) -> lr_scheduler.LRScheduler:
        if self.schedule == "one_cycle":
            share = self._rising(steps + 1)
            return lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps + 1, pct_start=share, cycle_momentum=False)
        if self.schedule in ("step", "constant"):
            drops = [round(milestone * steps) for milestone in self.milestones] if self.schedule == "step" else []
            return lr_scheduler.MultiStepLR(optimizer, drops)
        rising = max(0, min(round(self.warmup * steps), steps - 1)) if self.schedule == "warmup_cosine" else 0
        falling = lr_scheduler.CosineAnnealingLR(optimizer, steps - rising, eta_min=self.final_lr)
        if not rising:
            return falling
        scheduler = lr_scheduler.SequentialLR(optimizer, [lr_scheduler.LinearLR(optimizer, START, total_iters=rising), falling], [rising])
        # As a one-cycle schedule has it: so a run that is resumed to be longer than its schedule is known.
        scheduler.total_steps = steps + 1  # type: ignore[attr-defined]
        return scheduler

    def _rising(self, steps: int) -> float:
        """The fraction of the run that rises. Where that is one step exactly, torch divides by the zero steps in between: start at the peak."""
        return 0.0 if abs(self.warmup * steps - 1) < 1e-6 else self.warmup
