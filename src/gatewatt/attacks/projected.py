"""Steepest descent within a ball, with step sizes that adapt themselves: APGD carried over from accuracy to computation.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks" (ICML 2020), Algorithm 1:
momentum 0.75, a first step of 2 eps, halved per image at checkpoints where the loss stopped falling, and a restart from the best point. What is
kept is each image's iterate of most true FLOPs: the loss only steers.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from gatewatt.attacks.base import Attack, AttackResult, BestIterate, described_part, image_gradient, image_noise, refuse_broken
from gatewatt.attacks.directions import ComplexityOnly, Direction
from gatewatt.attacks.losses import CheapestGateLoss, GateLoss, OutputLoss
from gatewatt.attacks.saturation import unsaturated
from gatewatt.attacks.spaces import Ball, LinfBall
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, check_finite, gate_table


class ProjectedAttack(Attack):
    """Minimise a loss over gates or exits within a norm ball; keep each image's iterate of most FLOPs.

    Gradients are those of :func:`~gatewatt.attacks.saturation.unsaturated` scores.

    Args:
        loss: what the steps follow (default :class:`~gatewatt.attacks.losses.CheapestGateLoss`).
        direction: how the gradient is chosen; anything but the plain gradient needs a loss over gates.
        space: the ball (default L-inf 8/255).
        steps: iterations; one forward and one input-gradient each.
        restarts: starts per image; the first at the image itself, the others at random points of the ball.
        seed: of the random starts, which depend on it and on the image alone.
        decision: attack through this decision instead of the network's own.
        name: label in records and tables.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        loss: OutputLoss | None = None,
        direction: Direction | None = None,
        *,
        space: Ball | None = None,
        steps: int = 100,
        restarts: int = 1,
        seed: int = 0,
        decision: Literal["straight_through", "hard"] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(decision=decision, name=name)
        if steps < 1 or restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
        self.loss, self.direction, self.space = loss or CheapestGateLoss(), direction or ComplexityOnly(), space or LinfBall()
        if not isinstance(self.loss, GateLoss) and type(self.direction) is not ComplexityOnly:
            raise ValueError(f"direction {type(self.direction).__name__} needs a loss over gates, got {type(self.loss).__name__}")
        self.steps, self.restarts, self.seed = steps, restarts, seed

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        parts = {"loss": described_part(self.loss), "direction": described_part(self.direction), "space": described_part(self.space)}
        plain = {key: getattr(self, key) for key in ("steps", "restarts", "seed", "decision")}
        return {"name": self.name, **plain, **parts}

    def __repr__(self) -> str:
        return f"{self.name}(eps={self.space.eps:g}, steps={self.steps})"

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Every restart, keeping the best iterate of all."""
        best = BestIterate(images)
        for restart in range(self.restarts):
            start = torch.zeros_like(images)
            if restart:
                start = self.space.restrict(images, self.space.within(image_noise(images, self.seed, restart)))
            self._descend(network, images, start, ledger, best, restart * (self.steps + 1))
        return best.result

    def _descend(self, network: DynamicNetwork, images: Tensor, delta: Tensor, ledger: FlopsLedger, best: BestIterate, offset: int) -> None:
        count, checkpoints = len(images), step_checkpoints(self.steps)
        size = torch.full((count, 1, 1, 1), 2 * self.space.eps, device=images.device)
        previous, lowest_delta, lowest_gradient = delta, delta, torch.zeros_like(delta)
        lowest = torch.full((count,), torch.inf, dtype=torch.float64, device=images.device)
        # Since the last checkpoint: how often the loss fell. At the last checkpoint: the lowest loss, and whether the step was halved.
        falls, since = torch.zeros(count, device=images.device), 0
        lowest_before, halved_before = lowest, torch.ones(count, dtype=torch.bool, device=images.device)
        last_loss = -lowest  # the start is no fall
        for step in range(self.steps):
            loss, gradient = self._evaluate(network, images, delta, ledger, best, offset + step)
            falls, last_loss = falls + (loss < last_loss).float(), loss
            # Of equal losses the later: on a plateau one has to move on.
            lower = loss <= lowest
            lowest, chosen = torch.where(lower, loss, lowest), lower[:, None, None, None]
            lowest_delta, lowest_gradient = torch.where(chosen, delta, lowest_delta), torch.where(chosen, gradient, lowest_gradient)
            if step in checkpoints:
                stuck = ~halved_before & (lowest_before <= lowest)
                halved_before = (falls < 0.75 * since) | stuck
                lowest_before, falls, since = lowest, torch.zeros_like(falls), 0
                again = halved_before[:, None, None, None]
                size = torch.where(again, size / 2, size)
                # Halved images go back to their best point and take its gradient; momentum starts anew there.
                delta, gradient = torch.where(again, lowest_delta, delta), torch.where(again, lowest_gradient, gradient)
                previous, last_loss = torch.where(again, delta, previous), torch.where(halved_before, lowest, last_loss)
            since += 1
            moved = self.space.restrict(images, delta + size * self.space.steepest(gradient))
            if step:
                moved = self.space.restrict(images, delta + 0.75 * (moved - delta) + 0.25 * (delta - previous))
            delta, previous = moved, delta
        with torch.no_grad():
            final = self.space.image(images, delta)
            best.offer(final, ledger(network(final, "masked").gates), offset + self.steps)

    def _evaluate(
        self, network: DynamicNetwork, images: Tensor, delta: Tensor, ledger: FlopsLedger, best: BestIterate, step: int
    ) -> tuple[Tensor, Tensor]:
        """Loss (B,), float64, and gradient (B, 3, H, W) at ``delta``; offers the iterate on the way."""
        adversarial = self.space.image(images, delta).requires_grad_()
        with unsaturated():
            output = network(adversarial, "masked")
        check_finite(output)
        table = gate_table(output.gates)
        weights = (ledger.weights(output.gates) * table.score.shape[1]).to(table.score)
        best.offer(adversarial, ledger(output.gates), step)
        values: list[Tensor] = []

        def gradient(loss: Tensor, more: bool) -> Tensor:
            values.append(loss.detach().double())
            return image_gradient(loss, adversarial, more=more)

        if isinstance(self.loss, GateLoss):
            chosen = self.direction(self.loss, table, weights, gradient)
        else:
            chosen = gradient(self.loss.of(output, table, weights), False)
        refuse_broken(chosen)
        # A direction asks for the gradient of its loss on closed gates first, or for one sum of losses.
        return values[0], chosen


def step_checkpoints(steps: int) -> frozenset[int]:
    """Iterations at which step sizes are reconsidered: p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), times ``steps``.

    Example:
        >>> sorted(step_checkpoints(100))
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    points = [0.0, 0.22]
    while points[-1] < 1:
        points.append(points[-1] + max(points[-1] - points[-2] - 0.03, 0.06))
    return frozenset(math.ceil(round(point * steps, 6)) for point in points[1:] if math.ceil(round(point * steps, 6)) < steps)
