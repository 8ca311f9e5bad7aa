"""Complexity gradient masking inside the backward pass, as the authors' release of GradMDM has it.

Where a gate reads the features, the gradients of both readers meet: of the gate, and of the block that the gate decides about. The release
scales both to length 1, weighs the block's, and masks there what the paper masks once, at the image (Eqs. 10-12).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gatewatt.attacks.directions import Direction, Gradient
from gatewatt.attacks.losses import FinishedNormLoss, GateLoss
from gatewatt.attacks.spaces import image_norm
from gatewatt.gating import DynamicNetwork, GateTable


class LayerwiseMasking(Direction):
    """The gradient of the loss on closed gates, masked at every gate of a network that skips whole blocks.

    Two backward passes through one graph. At gate j of N the gradient of an image's features becomes ``n_j unit(block) + unit(gate)``, unit being
    the scaling to length 1: in the pass of the finished loss n_j is how many of the gates j..N are closed, in the pass of the loss on closed
    gates how many are open (the names in the release suggest the opposite). The first pass is remembered, and what opposes it is taken out of
    the second, per image. The gradient of a shortcut around a skipped block goes past all this; at the first gate it does not, as in the
    release.

    Args:
        finished: p of :class:`~gatewatt.attacks.losses.FinishedNormLoss`.

    Raises:
        ValueError: on use, unless every gate has one unit and a module of its own (:attr:`DynamicNetwork.overhead`) that is called with the features.
    """

    def __init__(self, finished: float = 0.35) -> None:
        self.finished = FinishedNormLoss(finished)

    @contextmanager
    def attached(self, network: DynamicNetwork) -> Iterator[Direction]:
        """Watch the modules that compute gates within the block."""
        points = GatePoints()
        handles = [network.register_forward_pre_hook(points.start)]
        handles += [network.get_submodule(path).register_forward_pre_hook(points.split) for path in network.overhead]
        try:
            yield _Attached(self.finished, points)
        finally:
            for handle in handles:
                handle.remove()

    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        """Not by itself: only what :meth:`attached` yields sees the passes."""
        raise ValueError("LayerwiseMasking works inside the backward passes of EnergyAttack; other attacks take ConflictMasking")


class _Attached(Direction):
    def __init__(self, finished: GateLoss, points: GatePoints) -> None:
        self.finished, self.points = finished, points

    def __call__(self, loss: GateLoss, table: GateTable, weights: Tensor, gradient: Gradient) -> Tensor:
        if len(self.points.remembered) != table.score.shape[1]:
            raise ValueError(
                f"the release's masking needs one gate module for each block that is skipped; this network calls {len(self.points.remembered)} "
                f"for {table.score.shape[1]} gated units: use GradMDM, which masks at the image"
            )
        with self.points.during("finished", table.executed):
            gradient(self.finished(table, weights), True)
        with self.points.during("closed", table.executed):
            return gradient(loss(table, weights), False)


class GatePoints:
    """The places of one forward pass where gates read features, and what is done to the gradients there."""

    def __init__(self) -> None:
        self.phase: Literal["finished", "closed"] | None = None
        self.remembered: list[Tensor | None] = []
        self.counts = self.executed = torch.empty(0)

    def start(self, module: nn.Module, inputs: Any) -> None:
        """A new forward pass."""
        self.remembered = []

    @contextmanager
    def during(self, phase: Literal["finished", "closed"], executed: Tensor) -> Iterator[None]:
        """Within the block, gradients are changed; ``executed`` (B, N) are the decisions of the pass."""
        counted = 1 - executed if phase == "finished" else executed
        self.phase, self.executed, self.counts = phase, executed, counted.flip(1).cumsum(1).flip(1)
        try:
            yield
        finally:
            self.phase = None

    def split(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Give a gate module a copy of its features (B, C, H, W), so that its gradient can be told from the block's."""
        features, *others = inputs
        if not features.requires_grad:
            return inputs
        index = len(self.remembered)
        self.remembered.append(None)
        of_gate: list[Tensor] = []

        def keep(gradient: Tensor) -> Tensor | None:
            if self.phase is None:
                return None
            of_gate.append(gradient)
            # The block's gradient then arrives alone: subtracting would lose it, small as it is beside a gate's.
            return torch.zeros_like(gradient)

        def change(gradient: Tensor) -> Tensor | None:
            if self.phase is None:
                return None
            mixed, past = self._mixed(index, gradient, of_gate.pop() if of_gate else torch.zeros_like(gradient))
            if self.phase == "finished":
                self.remembered[index] = mixed
            elif (before := self.remembered[index]) is not None:
                direction = guarded_unit(before)
                along = (mixed * direction).flatten(1).sum(1).clamp_max(0)
                mixed = mixed - along.view(-1, 1, 1, 1) * direction
            return mixed + past

        features.register_hook(change)
        copy = features.view_as(features)
        copy.register_hook(keep)
        return (copy, *others)

    def _mixed(self, index: int, of_block: Tensor, of_gate: Tensor) -> tuple[Tensor, Tensor]:
        """What passes through the gate's place, and what goes past it along the shortcut of a block that was skipped."""
        through = of_block
        if index:
            through = of_block * self.executed[:, index].to(of_block).view(-1, 1, 1, 1)
        count = self.counts[:, index].to(of_block).view(-1, 1, 1, 1)
        return count * guarded_unit(through) + guarded_unit(of_gate), of_block - through


def guarded_unit(tensor: Tensor) -> Tensor:
    """Each image scaled to Euclidean norm 1 with the release's guard: what is far below 1e-20, such as slopes under p = 50, counts as nothing."""
    return tensor / (image_norm(tensor) + 1e-20)
