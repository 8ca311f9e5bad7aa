"""Universal perturbations: one for all images, found on some and added to others.

Moosavi-Dezfooli et al., "Universal adversarial perturbations" (CVPR 2017), for computation instead of accuracy, by ascent on the summed loss as is
usual since; DeepSloth has such a variant with its own loss (Hong et al., ICLR 2021).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any, Literal

import torch
from torch import Tensor

from gatewatt.attacks.base import Attack, AttackResult, described_part, image_gradient, refuse_broken, under_attack
from gatewatt.attacks.losses import HingeLoss, OutputLoss
from gatewatt.attacks.saturation import unsaturated
from gatewatt.attacks.spaces import Ball, LinfBall, unit_length
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork, check_finite, check_images, gate_table


class UniversalAttack(Attack):
    """One perturbation (1, 3, H, W) within a ball, added to every image and clipped to [0, 1] per image.

    :meth:`fit` finds it, on images that the attack is not measured on; ``gatewatt test`` does so with training images, before the first batch.
    Calling the attack then adds it, without a look at the network. Every step follows the gradient of the loss summed over one batch of the
    images, the batches in turn, with momentum and a step size that falls linearly to zero; the last iterate is taken.

    Args:
        loss: what the steps follow (default :class:`~gatewatt.attacks.HingeLoss`; DeepSloth's is :class:`~gatewatt.attacks.UniformExitsLoss`).
        space: the ball (default L-inf 8/255).
        images: how many images to fit to: the first so many of those given.
        steps: batches that are looked at, again from the first one when they run out.
        step_size: the first, in units of the ball's radius.
        momentum: share of the earlier directions in each.
        decision: attack through this decision instead of the network's own.
        name: label in records and tables.

    Raises:
        ValueError: for a value out of range; when called before :meth:`fit`.
    """

    def __init__(
        self,
        loss: OutputLoss | None = None,
        *,
        space: Ball | None = None,
        images: int = 500,
        steps: int = 200,
        step_size: float = 0.25,
        momentum: float = 0.75,
        decision: Literal["straight_through", "hard"] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(decision=decision, name=name or "Universal")
        if images < 1 or steps < 1:
            raise ValueError(f"images and steps must be at least 1, got {images} and {steps}")
        if not 0 < step_size <= 2 or not 0 <= momentum < 1:
            raise ValueError(f"step_size must be in (0, 2] and momentum in [0, 1), got {step_size} and {momentum}")
        self.loss, self.space = loss or HingeLoss(), space or LinfBall()
        self.images, self.steps, self.step_size, self.momentum = images, steps, step_size, momentum
        self.perturbation: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records; the images that it was fitted to are the data's."""
        plain = {key: getattr(self, key) for key in ("images", "steps", "step_size", "momentum", "decision")}
        return {"name": self.name, **plain, "loss": described_part(self.loss), "space": described_part(self.space)}

    def __repr__(self) -> str:
        return f"{self.name}(eps={self.space.eps:g}, steps={self.steps})"

    def fit(self, network: DynamicNetwork, batches: Iterable[Tensor], *, ledger: FlopsLedger | None = None) -> UniversalAttack:
        """Find the perturbation.

        Args:
            network: the network to craft on, left as it was.
            batches: of images (B, 3, H, W) in [0, 1], all of one size; for a tensor of all images ``images.split(100)``.
            ledger: prices at the images' resolution; measured on the spot when left out.

        Returns:
            Itself, with :attr:`perturbation` (1, 3, H, W) set.

        Raises:
            ValueError: if there are no images, they are invalid, or a gradient was missing, NaN or infinite.
        """
        kept: list[Tensor] = []
        left = self.images
        for batch in batches:
            check_images(batch)
            kept.append(batch[:left].detach().float())
            left -= len(kept[-1])
            if left == 0:
                break
        if not kept:
            raise ValueError("a universal perturbation needs images to be fitted to, got none")
        ledger = ledger or price(network, kept[0][:1])
        with under_attack(network, self.decision):
            delta = torch.zeros_like(kept[0][:1])
            direction = torch.zeros_like(delta)
            for step, images in enumerate(islice(cycle(kept), self.steps)):
                # Of length 1 each, so that a batch of steep slopes does not outvote the others.
                direction = self.momentum * direction + unit_length(self._gradient(network, images, delta, ledger))
                size = self.step_size * self.space.eps * (1 - step / self.steps)
                delta = self.space.ball(delta + size * self.space.steepest(direction))
        self.perturbation = delta
        return self

    def _gradient(self, network: DynamicNetwork, images: Tensor, delta: Tensor, ledger: FlopsLedger) -> Tensor:
        """Of the loss summed over ``images``, with respect to the one ``delta``."""
        moved = images + delta
        adversarial = moved.clamp(0, 1).requires_grad_()
        with unsaturated():
            output = network(adversarial, "masked")
        check_finite(output)
        table = gate_table(output.gates)
        weights = (ledger.weights(output.gates) * table.score.shape[1]).to(table.score)
        gradient = image_gradient(self.loss.of(output, table, weights), adversarial)
        refuse_broken(gradient)
        # A pixel that is clipped does not move with delta.
        return torch.where((moved >= 0) & (moved <= 1), gradient, 0.0).sum(0, keepdim=True)

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Add the perturbation."""
        if self.perturbation is None:
            raise ValueError(f"{self.name} has no perturbation yet: call fit(network, batches of images) first")
        if self.perturbation.shape[1:] != images.shape[1:]:
            raise ValueError(f"{self.name} was fitted to images of {tuple(self.perturbation.shape[1:])}, these are {tuple(images.shape[1:])}")
        delta = self.space.restrict(images, self.perturbation.to(images).expand_as(images))
        return AttackResult(self.space.image(images, delta), torch.full((len(images),), self.steps, device=images.device))
