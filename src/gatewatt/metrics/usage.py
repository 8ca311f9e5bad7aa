"""Which units ran, and how often: a network whose gates ignore the image is static, and its recovery means nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class GateUsage(Metric):
    """Share of images for which each unit executed.

    Args:
        units: number N of units, in any order that does not change.

    Example:
        >>> usage = GateUsage(units=2)
        >>> usage.update(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
        >>> usage.compute().tolist()
        [1.0, 0.5]
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    executed: Tensor
    images: Tensor

    def __init__(self, units: int) -> None:
        super().__init__()
        if units < 1:
            raise ValueError(f"units must be at least 1, got {units}")
        self.units = units
        # The number of units is fixed up front so that a process without images still reduces with the others.
        self.add_state("executed", torch.zeros(units, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, executed: Tensor) -> None:
        """Add what ran for a batch.

        Args:
            executed: 0 or 1, (B, N), such as ``gate_table(gates).executed``.

        Raises:
            ValueError: on another shape or values other than 0 and 1; nothing is added then.
        """
        if executed.ndim != 2 or executed.shape[1] != self.units:
            raise ValueError(f"executed must have shape (B, {self.units}), got {tuple(executed.shape)}")
        ran = executed.detach() == 1
        if not bool((ran | (executed == 0)).all()):
            raise ValueError("executed must hold 0 and 1 only")
        self.executed += ran.sum(dim=0)
        self.images += len(executed)

    def compute(self) -> Tensor:
        """Rate of each unit over all images of all processes, float64 (N,) in [0, 1]; NaN before the first image."""
        return self.executed.to(torch.float64) / self.images
