"""DeepSloth: keep every early exit undecided (Hong et al., "A Panda? No, It's a Sloth", ICLR 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from gatewatt.attacks.base import Attack, AttackResult, image_gradient, image_noise, refuse_broken
from gatewatt.attacks.losses import OutputLoss, UniformExitsLoss, UniformHaltingLoss
from gatewatt.attacks.spaces import Ball, L2Ball, LinfBall, image_norm, unit_length
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, check_finite, gate_table

TARGETS: dict[str, Callable[[], OutputLoss]] = {"exits": UniformExitsLoss, "halting": UniformHaltingLoss}


class DeepSloth(Attack):
    """Cross entropy of all exits but the last against the uniform distribution, minimised with the release's schedules.

    L-inf: 30 sign steps of 0.002 from a random start within one step, in a ball of 8/256. L2: 550 steps of SGD, learning rate 1 falling to 0.01
    by a cosine, gradients no longer than 1, from a random direction of length 1; the radius starts at 1 and shrinks by 0.9 every 50 steps,
    to 0.35 at the end. The release takes the mean of the loss over the batch, so that its L2 steps depend on the batch size; here every image
    has its own. The last iterate is returned, as there.

    Networks whose exits have no classifiers (SACT, A-ViT), or that have no exits, cannot be attacked by it. For them ``target="halting"`` runs the
    same schedules on a loss of this package (:class:`~gatewatt.attacks.UniformHaltingLoss`), named ``DeepSloth-uniform-halting`` in every
    record: a substitute, not DeepSloth.

    Args:
        norm: ``linf`` or ``l2``.
        target: what is made undecided: ``exits``, or as a substitute every gate's decision between going on and ``halting``.
        steps: iterations (30 for L-inf, 550 for L2); the L2 radius shrinks in eleven equal parts of them.
        eps: radius at the start (8/256 for L-inf, 1 for L2).
        seed: of the random start, which depends on it and on the image alone.

    Raises:
        ValueError: for a value out of range; on use, if the network has no exits.
    """

    def __init__(
        self,
        norm: Literal["linf", "l2"] = "linf",
        *,
        target: Literal["exits", "halting"] = "exits",
        steps: int | None = None,
        eps: float | None = None,
        seed: int = 0,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(f"target must be {' or '.join(TARGETS)}, got {target!r}")
        super().__init__(name="DeepSloth" if target == "exits" else "DeepSloth-uniform-halting")
        if norm not in ("linf", "l2"):
            raise ValueError(f"norm must be linf or l2, got {norm!r}")
        steps = steps if steps is not None else {"linf": 30, "l2": 550}[norm]
        eps = eps if eps is not None else {"linf": 8 / 256, "l2": 1.0}[norm]
        if steps < 1 or not 0 < eps < math.inf:
            raise ValueError(f"steps must be at least 1 and eps finite and positive, got {steps} and {eps}")
        self.norm, self.steps, self.eps, self.seed = norm, steps, eps, seed
        self.target, self.loss = target, TARGETS[target]()

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        return {"name": self.name, **{key: getattr(self, key) for key in ("norm", "target", "steps", "eps", "seed", "decision")}}

    def __repr__(self) -> str:
        return f"{self.name}({self.norm}, eps={self.eps:g}, steps={self.steps})"

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Step by step, in the ball of its norm."""
        start = 2 * image_noise(images, self.seed) - 1
        ball: Ball
        if self.norm == "linf":
            ball, step_size = LinfBall(self.eps), 0.002
            delta = ball.restrict(images, step_size * start)
        else:
            ball = L2Ball(self.eps)
            delta = ball.restrict(images, unit_length(start))
        for step in range(self.steps):
            adversarial = ball.image(images, delta).requires_grad_()
            output = network(adversarial, "masked")
            if step == 0:
                check_finite(output)
            table = gate_table(output.gates)
            loss = self.loss.of(output, table, torch.ones_like(table.score[0]))
            gradient = image_gradient(loss, adversarial)
            refuse_broken(gradient)
            if self.norm == "linf":
                moved = delta - step_size * gradient.sign()
            else:
                ball = L2Ball(self.eps * 0.9 ** math.floor(11 * step / self.steps))
                rate = 0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2
                moved = delta - rate * gradient / image_norm(gradient).clamp_min(1)
            delta = ball.restrict(images, moved)
        return AttackResult(ball.image(images, delta).detach(), torch.full((len(images),), self.steps, device=images.device))
