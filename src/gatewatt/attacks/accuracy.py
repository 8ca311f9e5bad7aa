"""Projected gradient descent against the prediction: the attack of accuracy-adversarial training, which knows nothing of gates.

Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018). Here it is a yardstick: what a network trained against
it withstands without being asked is what energy-adversarial training has to beat, and a defended network must not have paid with it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.attacks.base import Attack, AttackResult, described_part, image_gradient, image_noise, refuse_broken
from gatewatt.attacks.spaces import Ball, LinfBall
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, check_finite


class AccuracyPGD(Attack):
    """Ascend the cross entropy of the true labels within a norm ball, in equal steps of steepest ascent; the last iterate is kept.

    Gradients run through the masked pass, and so through decisions where they let them. What happens to the FLOPs is left to chance.

    Args:
        space: the ball (default L-inf 8/255, as published for CIFAR-10).
        steps: iterations (7 in the paper's training on CIFAR-10, 20 in its evaluation).
        lr: length of a step, in the units of the ball; None for 2.5 eps / steps, which reaches the edge from any start.
        random_start: begin at a random point of the ball, as published; else at the image.
        seed: of the random start, which depends on it and on the image alone.
        decision: attack through this decision instead of the network's own.
        name: label in records and tables.

    Raises:
        ValueError: for a value out of range; on use, without labels.
    """

    def __init__(
        self,
        *,
        space: Ball | None = None,
        steps: int = 7,
        lr: float | None = None,
        random_start: bool = True,
        seed: int = 0,
        decision: Literal["straight_through", "hard"] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(decision=decision, name=name)
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if lr is not None and not 0 < lr < math.inf:
            raise ValueError(f"lr must be finite and positive, got {lr}")
        self.space = space or LinfBall()
        self.steps, self.lr = steps, 2.5 * self.space.eps / steps if lr is None else lr
        self.random_start, self.seed = random_start, seed

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        plain = {key: getattr(self, key) for key in ("steps", "lr", "random_start", "seed", "decision")}
        return {"name": self.name, **plain, "space": described_part(self.space)}

    def __repr__(self) -> str:
        return f"{self.name}(eps={self.space.eps:g}, steps={self.steps})"

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """One forward and one input-gradient a step."""
        if labels is None:
            raise ValueError(f"{self.name} ascends the cross entropy of the true classes: give labels")
        delta = torch.zeros_like(images)
        if self.random_start:
            delta = self.space.restrict(images, self.space.within(image_noise(images, self.seed)))
        for _ in range(self.steps):
            adversarial = self.space.image(images, delta).requires_grad_()
            output = network(adversarial, "masked")
            check_finite(output)
            # Attacks minimise: what is descended here is minus the cross entropy.
            descended = -functional.cross_entropy(output.logits.float(), labels, reduction="none")
            gradient = image_gradient(descended, adversarial)
            refuse_broken(gradient)
            delta = self.space.restrict(images, delta + self.lr * self.space.steepest(gradient))
        return AttackResult(self.space.image(images, delta), torch.full((len(images),), self.steps, device=images.device))
