"""A network family's training loss: named terms whose sum is minimised."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput

Terms = dict[str, Tensor]
"""Name -> scalar, already weighted; the loss is their sum, and each is logged under its name."""


class Objective(ABC):
    """Turns a network's output into the terms of its training loss.

    Attributes:
        progress: how much of the run is done, in [0, 1); the training task sets it before every step, for losses that follow a schedule.
    """

    progress: float = 0.0

    @abstractmethod
    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """The weighted terms for one batch; ``labels`` are classes (B,), or the share of each class (B, K) where images were mixed."""


class CrossEntropy(Objective):
    """Mean cross entropy alone: SkipNet's supervised stage as published. It may end at 100 % computation.

    Args:
        label_smoothing: in [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """The single term ``cross_entropy``."""
        return {"cross_entropy": functional.cross_entropy(output.logits.float(), labels, label_smoothing=self.label_smoothing)}
