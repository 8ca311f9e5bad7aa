"""From gate losses to an image gradient: joint, complexity only, or with complexity gradient masking.

Pan et al., "GradMDM" (TPAMI 2023), Sec. 4.3, Eqs. 8-12, at the input and per image. The authors' release masks inside the backward pass
instead, per layer: :mod:`gatewatt.attacks.layerwise`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gatewatt.attacks.losses import FinishedLoss, GateLoss
from gatewatt.attacks.spaces import unit_length
from gatewatt.gating import DynamicNetwork, GateTable

TINY = 1e-12
"""Below this norm the gradient of the open gates counts as absent: no gate is open, so none can be shielded."""


def mask_conflict(g_closed: Tensor, g_open: Tensor) -> Tensor:
    """Drop from ``g_closed`` what would close gates that are already open (Eq. 12).

    Where the two gradients of an image conflict (negative inner product), the component of ``g_closed`` along ``g_open`` is removed.

    Args:
        g_closed: gradient of the loss on closed gates, shape (B, 3, H, W).
        g_open: gradient of the loss on open gates, same shape.

    Returns:
        The rectified gradient, shape (B, 3, H, W). An all-zero ``g_open`` changes nothing.

    Example:
        >>> g = mask_conflict(torch.tensor([[[[1.0, -1.0]]]]), torch.tensor([[[[0.0, 1.0]]]]))
        >>> g.tolist()
        [[[[1.0, 0.0]]]]
    """
    # Per image, not over the batch: one image's open gates must not shield another's closed ones. Gradients of deep gates can be below
    # 1e-20, whose square float32 cannot hold, so the projection is taken along the unit vector.
    norm = g_open.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    unit = g_open / norm.clamp_min(TINY)
    along = (g_closed * unit).flatten(1).sum(1).view(-1, 1, 1, 1)
    return torch.where((along < 0) & (norm >= TINY), g_closed - along * unit, g_closed)


Gradient = Callable[[Tensor, bool], Tensor]
"""``gradient(loss_per_image, more)``: gradient of the summed loss at the perturbation; ``more`` keeps the graph for another call."""


class Direction(ABC):
    """Chooses the gradient that a step follows."""

    @abstractmethod
    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        """Gradient to descend, shape (B, 3, H, W).

        Args:
            loss: the loss on closed gates.
            table: scores and thresholds, (B, N).
            weights: lambda times N, (N,).
            gradient: see :data:`Gradient`; images never interact, so summing over the batch keeps gradients per image.
        """

    @contextmanager
    def attached(self, network: DynamicNetwork) -> Iterator[Direction]:
        """The direction as it follows the passes of ``network`` within the block: itself, unless it has to watch them."""
        yield self


class ComplexityOnly(Direction):
    """The gradient of the loss on closed gates alone (Eqs. 6 and 7)."""

    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        """One backward pass."""
        return gradient(loss(table, weights), False)


class Joint(Direction):
    """The gradient of the sum of the losses on closed and open gates.

    With :class:`~gatewatt.attacks.losses.ComplexityLoss` this is Eq. 5, since min(G, tau) + max(G, tau) = G + tau; with the power loss it is the
    paper's ``L_P + L_F``.
    """

    finished = FinishedLoss()

    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        """One backward pass."""
        return gradient(loss(table, weights) + self.finished(table, weights), False)


class ConflictMasking(Direction):
    """Complexity gradient masking (CGM): the loss on closed gates, rectified by :func:`mask_conflict`; lambda weighs both losses."""

    finished = FinishedLoss()

    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        """Two backward passes through one graph."""
        return mask_conflict(gradient(loss(table, weights), True), gradient(self.finished(table, weights), False))


class UnitLength(Direction):
    """Another direction, scaled to Euclidean length 1 per image, as GradAuto does before it adds the penalty's gradient.

    Args:
        inner: the direction to scale (default :class:`ConflictMasking`).
    """

    def __init__(self, inner: Direction | None = None) -> None:
        self.inner = inner or ConflictMasking()

    @contextmanager
    def attached(self, network: DynamicNetwork) -> Iterator[Direction]:
        """The attached inner direction, scaled."""
        with self.inner.attached(network) as inner:
            yield UnitLength(inner)

    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        """As many backward passes as the inner direction; an all-zero gradient stays zero."""
        return unit_length(self.inner(loss, table, weights, gradient))
