"""Networks that seem to withstand attacks, each by another trick, around one toy whose gates are honest."""

from __future__ import annotations

import torch
from tests.toys import Logistic, Saturated
from torch import Tensor

from gatewatt.gating import DynamicOutput, Execution, hard


class AlwaysOn(Logistic):
    """Every gate is open, whatever the image."""

    def scores(self, pixels: Tensor) -> Tensor:
        return torch.sigmoid(20 + super().logits(pixels))


class AlwaysOff(Logistic):
    """Every gate is closed, whatever the image."""

    def scores(self, pixels: Tensor) -> Tensor:
        return torch.sigmoid(super().logits(pixels) - 20)


class Detached(Logistic):
    """A decision without a gradient."""

    def scores(self, pixels: Tensor) -> Tensor:
        return super().scores(pixels.detach())


class HalfDetached(Logistic):
    """The scores of three gates in five have no gradient."""

    def scores(self, pixels: Tensor) -> Tensor:
        scores = super().scores(pixels)
        return torch.cat([scores[:, :3].detach(), scores[:, 3:]], dim=1)


class Random(Logistic):
    """Gates that are drawn anew in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.decision = lambda name, score, threshold, *, training: torch.bernoulli(score.detach())


class Misleading(Logistic):
    """The right scores with the wrong sign of their gradient."""

    def scores(self, pixels: Tensor) -> Tensor:
        scores = super().scores(pixels)
        return 2 * scores.detach() - scores


class OneRoute(Logistic):
    """Gates that open together, and for no clean image: the saving is that of a static network."""

    def scores(self, pixels: Tensor) -> Tensor:
        return torch.sigmoid(super().logits(pixels)[:, :1] - 4).expand(-1, 5)


class Broken(Logistic):
    """A score that is not a number for dark images."""

    def scores(self, pixels: Tensor) -> Tensor:
        return super().scores(pixels) + 0 * torch.log((pixels.mean(1, keepdim=True) > 0.4).float())


class Fractions(Logistic):
    """Looks at what is left of a pixel beside its 8-bit level, and at nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.decision = hard

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        return super().forward(images.detach() + 255 * images - (255 * images).round().detach(), execution)


FIVE = {"always on": AlwaysOn, "always off": AlwaysOff, "scaled by 1000": Saturated, "without gradient": Detached, "random": Random}
"""The planted fakes that a doctor must catch."""
