"""Gate losses: what an energy attack minimises, per image (Pan et al., "GradMDM", TPAMI 2023, Eqs. 5-8).

Every loss takes the gate table and the weights lambda (Sec. 4.4: the unit's share of the FLOPs that all units can save) and returns one number
per image. The paper leaves the scale of lambda open; here it is multiplied by N, so that the mean weight is 1 and the scale of the losses
does not depend on the number of units. Scores are the raw G of all gates, whatever an earlier exit left unexecuted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from gatewatt.gating import GateTable


class GateLoss(ABC):
    """A loss over gates, one number per image."""

    @abstractmethod
    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Loss of each image.

        Args:
            table: scores and thresholds of all units, (B, N).
            weights: lambda times N, (N,), mean 1.

        Returns:
            Loss, shape (B,). Lower means more computation.
        """


class ComplexityLoss(GateLoss):
    """Open what is closed (Eq. 6): ``-sum lambda_i min(G_i, tau)``.

    Example:
        >>> table = GateTable(torch.tensor([[0.2, 0.9]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0]]))
        >>> round(ComplexityLoss()(table, torch.ones(2)).item(), 4)
        -0.7
    """

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Eq. 6 per image, shape (B,)."""
        return -(weights * torch.minimum(table.score, table.threshold)).sum(1)


class PowerLoss(GateLoss):
    """Open first what is nearly open (Eq. 7): ``-sum lambda_i min(G_i, tau)^alpha``.

    Args:
        alpha: at least 1; 1 is Eq. 6. The paper uses 4.

    Raises:
        ValueError: if ``alpha`` is below 1, where the loss would favour the gates that are furthest from opening.
    """

    def __init__(self, alpha: float = 4.0) -> None:
        if not 1 <= alpha < math.inf:
            raise ValueError(f"alpha must be finite and at least 1 (Eq. 7), got {alpha}")
        self.alpha = float(alpha)

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Eq. 7 per image, shape (B,)."""
        return -(weights * torch.minimum(table.score, table.threshold) ** self.alpha).sum(1)


class FinishedLoss(GateLoss):
    """Keep open what is open (Eq. 8): ``-sum lambda_i max(G_i, tau)``; linear, as in the paper, whatever the power of Eq. 7."""

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Eq. 8 per image, shape (B,)."""
        return -(weights * torch.maximum(table.score, table.threshold)).sum(1)
