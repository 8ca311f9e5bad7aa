"""Steepest descent within a ball, with step sizes that adapt themselves: APGD carried over from accuracy to computation.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks" (ICML 2020), Algorithm 1:
momentum 0.75, a first step of 2 eps, halved per image at checkpoints where the loss stopped falling, and a restart from the best point. What is
kept is each image's iterate of most true FLOPs: the loss only steers. An image that runs everything is done, and the others go on without it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
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


class LastIterate(BestIterate):
    """Each image's latest iterate, whatever it spends; no image is ever done."""

    def offer(self, candidate: Tensor, flops: Tensor, step: int | Tensor, rows: Tensor | None = None) -> Tensor:
        """Take every candidate."""
        self.flops.fill_(-torch.inf)
        return super().offer(candidate, flops, step, rows)

    def unfinished(self, ledger: FlopsLedger) -> Tensor:
        """All positions, (B,)."""
        return torch.arange(len(self.images), device=self.images.device)


@dataclass
class Descent:
    """Where the images that are still under way stand; first axis b.

    Attributes:
        rows: their positions in the batch, (b,).
        images: clean, (b, 3, H, W).
        delta: perturbation, as the four tensors after it.
        gradient: at ``delta``.
        previous: one step earlier.
        lowest_delta: where the loss was lowest.
        lowest_gradient: there.
        size: of a step, (b, 1, 1, 1).
        loss: at the point before, (b,), as all after it.
        lowest: lowest loss so far.
        lowest_before: the same at the last checkpoint.
        halved_before: whether the step was halved there.
        falls: how often the loss has fallen since.
    """

    rows: Tensor
    images: Tensor
    delta: Tensor
    gradient: Tensor
    previous: Tensor
    lowest_delta: Tensor
    lowest_gradient: Tensor
    size: Tensor
    loss: Tensor
    lowest: Tensor
    lowest_before: Tensor
    halved_before: Tensor
    falls: Tensor

    @classmethod
    def begin(cls, rows: Tensor, images: Tensor, delta: Tensor, size: float) -> Descent:
        """At ``delta``, which nothing was evaluated at yet."""
        unknown = torch.full((len(images),), torch.inf, dtype=torch.float64, device=images.device)
        zeros, sizes = torch.zeros_like(delta), torch.full((len(images), 1, 1, 1), size, device=images.device)
        # The first loss is no fall.
        first, halved = -unknown, torch.ones_like(unknown, dtype=torch.bool)
        return cls(rows, images, delta, zeros, delta, delta, zeros, sizes, first, unknown, unknown, halved, torch.zeros_like(unknown))

    def keep(self, left: Tensor) -> None:
        """Go on with some of the images alone, ``left`` bool (b,)."""
        if bool(left.all()):
            return
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name)[left])


class ProjectedAttack(Attack):
    """Minimise a loss over gates or exits within a norm ball; keep each image's iterate of most FLOPs.

    Gradients are those of :func:`~gatewatt.attacks.saturation.unsaturated` scores.

    Args:
        loss: what the steps follow (default :class:`~gatewatt.attacks.losses.CheapestGateLoss`).
        direction: how the gradient is chosen; anything but the plain gradient needs a loss over gates.
        space: the ball (default L-inf 8/255).
        steps: iterations; one forward and one input-gradient each.
        first_step: size of the first step in radii (2, as in the paper); a descent that goes on from a good point takes less.
        restarts: starts per image; the first at the image itself, the others at random points of the ball.
        seed: of the random starts, which depend on it and on the image alone.
        keep: each image's ``best`` iterate by true FLOPs, or the ``last`` one of a single start, for an attack that goes on where it stopped: of a
            few steps the best is often the image itself, since moving towards a gate counts for nothing until it opens.
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
        first_step: float = 2.0,
        restarts: int = 1,
        seed: int = 0,
        keep: Literal["best", "last"] = "best",
        decision: Literal["straight_through", "hard"] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(decision=decision, name=name)
        if steps < 1 or restarts < 1:
            raise ValueError(f"steps and restarts must be at least 1, got {steps} and {restarts}")
        self.loss, self.direction, self.space = loss or CheapestGateLoss(), direction or ComplexityOnly(), space or LinfBall()
        if not isinstance(self.loss, GateLoss) and type(self.direction) is not ComplexityOnly:
            raise ValueError(f"direction {type(self.direction).__name__} needs a loss over gates, got {type(self.loss).__name__}")
        if not 0 < first_step < math.inf:
            raise ValueError(f"first_step must be finite and positive, in radii, got {first_step}")
        if keep not in ("best", "last") or (keep == "last" and restarts > 1):
            raise ValueError(f"keep must be best, or last with restarts 1, got {keep!r} with restarts {restarts}")
        self.steps, self.first_step, self.restarts, self.seed, self.keep = steps, float(first_step), restarts, seed, keep

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        parts = {"loss": described_part(self.loss), "direction": described_part(self.direction), "space": described_part(self.space)}
        plain = {key: getattr(self, key) for key in ("steps", "first_step", "restarts", "seed", "keep", "decision")}
        return {"name": self.name, **plain, **parts}

    def __repr__(self) -> str:
        return f"{self.name}(eps={self.space.eps:g}, steps={self.steps})"

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Every restart, keeping the best iterate of all."""
        best = BestIterate(images) if self.keep == "best" else LastIterate(images)
        for restart in range(self.restarts):
            start = torch.zeros_like(images)
            if restart:
                start = self.space.restrict(images, self.space.within(image_noise(images, self.seed, restart)))
            self._descend(network, images, start, ledger, best, restart * (self.steps + 1))
        return best.result

    def craft_from(self, start: Tensor, network: DynamicNetwork, images: Tensor, ledger: FlopsLedger) -> AttackResult:
        """One descent from perturbed images ``start`` (B, 3, H, W) inside the ball; otherwise as :meth:`craft`."""
        best = BestIterate(images)
        self._descend(network, images, self.space.restrict(images, start - images), ledger, best, 0)
        return best.result

    def _descend(self, network: DynamicNetwork, images: Tensor, delta: Tensor, ledger: FlopsLedger, best: BestIterate, offset: int) -> None:
        """From ``delta``, for the images whose best iterate does not run everything yet."""
        rows, checkpoints, since = best.unfinished(ledger), step_checkpoints(self.steps), 0
        at = Descent.begin(rows, images[rows], delta[rows], self.first_step * self.space.eps)
        for step in range(self.steps):
            if len(at.rows) == 0:
                return
            before = at.loss
            self._evaluate(network, at, ledger, best, offset + step)
            at.falls = at.falls + (at.loss < before)
            at.keep(torch.isin(at.rows, best.unfinished(ledger)))
            refuse_broken(at.gradient, at.rows)
            # Of equal losses the later: on a plateau one has to move on.
            lower = at.loss <= at.lowest
            at.lowest, chosen = torch.where(lower, at.loss, at.lowest), lower[:, None, None, None]
            at.lowest_delta, at.lowest_gradient = torch.where(chosen, at.delta, at.lowest_delta), torch.where(chosen, at.gradient, at.lowest_gradient)
            if step in checkpoints:
                self._reconsider(at, since)
                since = 0
            since += 1
            moved = self.space.restrict(at.images, at.delta + at.size * self.space.steepest(at.gradient))
            if step:
                moved = self.space.restrict(at.images, at.delta + 0.75 * (moved - at.delta) + 0.25 * (at.delta - at.previous))
            at.delta, at.previous = moved, at.delta
        if len(at.rows):
            with torch.no_grad():
                final = self.space.image(at.images, at.delta)
                best.offer(final, ledger(network(final, "masked").gates), offset + self.steps, at.rows)

    @staticmethod
    def _reconsider(at: Descent, since: int) -> None:
        """Halve the steps of images whose loss fell in fewer than three quarters of the ``since`` last steps, or not since the last checkpoint."""
        stuck = ~at.halved_before & (at.lowest_before <= at.lowest)
        at.halved_before = (at.falls < 0.75 * since) | stuck
        at.lowest_before, at.falls = at.lowest, torch.zeros_like(at.falls)
        again = at.halved_before[:, None, None, None]
        at.size = torch.where(again, at.size / 2, at.size)
        # Halved images go back to their best point and take its gradient; momentum starts anew there.
        at.delta, at.gradient = torch.where(again, at.lowest_delta, at.delta), torch.where(again, at.lowest_gradient, at.gradient)
        at.previous, at.loss = torch.where(again, at.delta, at.previous), torch.where(at.halved_before, at.lowest, at.loss)

    def _evaluate(self, network: DynamicNetwork, at: Descent, ledger: FlopsLedger, best: BestIterate, step: int) -> None:
        """Leave loss and gradient at ``delta`` in ``at``, and offer the iterate on the way."""
        adversarial = self.space.image(at.images, at.delta).requires_grad_()
        with unsaturated():
            output = network(adversarial, "masked")
        check_finite(output)
        table = gate_table(output.gates)
        weights = (ledger.weights(output.gates) * table.score.shape[1]).to(table.score)
        best.offer(adversarial, ledger(output.gates), step, at.rows)
        values: list[Tensor] = []

        def gradient(loss: Tensor, more: bool) -> Tensor:
            values.append(loss.detach().double())
            return image_gradient(loss, adversarial, more=more)

        if isinstance(self.loss, GateLoss):
            at.gradient = self.direction(self.loss, table, weights, gradient)
        else:
            at.gradient = gradient(self.loss.of(output, table, weights), False)
        # A direction asks for the gradient of its loss on closed gates first, or for one sum of losses.
        at.loss = values[0]


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
