"""Perturbations that know nothing of the network: what every attack must beat."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gatewatt.attacks.base import Attack, AttackResult, described_part, image_noise
from gatewatt.attacks.spaces import Ball, LinfBall, unit_length
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork


class Noise(Attack):
    """Noise, a constant shift or a flat image, as large as the ball allows.

    Args:
        kind: ``uniform`` or ``gaussian`` noise, a ``shift`` of all pixels to the brighter or darker side (whichever has more room), or ``flat``: the
            image's mean colour, or as near to it as the ball reaches. In an L-inf ball, uniform noise fills it and Gaussian noise has a
            standard deviation of half its radius.
        space: the ball (default L-inf 8/255).
        seed: of the noise, which depends on it and on the image alone.
    """

    def __init__(self, kind: Literal["uniform", "gaussian", "shift", "flat"] = "uniform", *, space: Ball | None = None, seed: int = 0) -> None:
        if kind not in ("uniform", "gaussian", "shift", "flat"):
            raise ValueError(f"kind must be uniform, gaussian, shift or flat, got {kind!r}")
        super().__init__(name=f"Noise-{kind}")
        self.kind, self.space, self.seed = kind, space or LinfBall(), seed

    def __repr__(self) -> str:
        return f"{self.name}(eps={self.space.eps:g})"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        return {"name": self.name, "kind": self.kind, "seed": self.seed, "decision": None, "space": described_part(self.space)}

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """One draw per image."""
        if self.kind == "flat":
            delta = self.space.ball(images.mean((2, 3), keepdim=True) - images)
        elif self.kind == "shift":
            delta = self._sized(torch.where(images.mean((1, 2, 3), keepdim=True) < 0.5, 1.0, -1.0).expand_as(images))
        else:
            noise = image_noise(images, self.seed)
            # Uniform in (-1, 1), or its image under the normal quantile function.
            delta = self._sized(2 * noise - 1 if self.kind == "uniform" else torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6)))
            # A pixel without room on one side goes to the other: clipped noise would be smaller than what it is compared with.
            delta = torch.where((images + delta < 0) | (images + delta > 1), -delta, delta)
        delta = self.space.restrict(images, delta)
        return AttackResult(self.space.image(images, delta), torch.ones(len(images), dtype=torch.int64, device=images.device))

    def _sized(self, direction: Tensor) -> Tensor:
        if self.space.order == 2:
            return self.space.eps * unit_length(direction)
        return self.space.eps * direction / (2 if self.kind == "gaussian" else 1)
