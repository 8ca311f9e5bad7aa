"""Where a perturbation lives, and how it becomes a valid image.

A space maps the variable ``delta`` to an image in [0, 1] and pulls an image gradient back to ``delta``; both analytically, so that the
network's graph is the only one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Space(ABC):
    """A parametrisation of valid images around given ones."""

    def encode(self, images: Tensor) -> Tensor:
        """The fixed anchor that ``delta`` is added to, shape (B, 3, H, W); the images themselves unless a space says otherwise."""
        return images

    @abstractmethod
    def image(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """The perturbed images in [0, 1], shape (B, 3, H, W); ``delta = 0`` gives the encoded images."""

    @abstractmethod
    def pullback(self, image: Tensor, gradient: Tensor) -> Tensor:
        """Gradient with respect to ``delta``, from the perturbed ``image`` and the gradient with respect to it."""

    def restrict(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """Bring ``delta`` back to where it may be after a step; the default allows everything."""
        return delta


class TanhSpace(Space):
    """``x' = (tanh(atanh(2x - 1) + delta) + 1) / 2``: unconstrained steps, valid images (Eq. 2, with the start of Carlini and Wagner).

    The paper's Eq. 2 read literally, (tanh(x + delta) + 1) / 2, distorts every image before the first step; with the inverse map as the
    start, ``delta = 0`` is the identity, up to ``margin``.

    Args:
        margin: pixels are kept this far inside (0, 1), where atanh is finite.
    """

    def __init__(self, margin: float = 1e-4) -> None:
        if not 0 < margin < 0.5:
            raise ValueError(f"margin must be in (0, 0.5), got {margin}")
        self.margin = float(margin)

    def encode(self, images: Tensor) -> Tensor:
        """``atanh(2x - 1)``, finite."""
        return torch.atanh(2 * images.clamp(self.margin, 1 - self.margin) - 1)

    def image(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """Perturbed images in [0, 1]."""
        return (torch.tanh(anchor + delta) + 1) / 2

    def pullback(self, image: Tensor, gradient: Tensor) -> Tensor:
        """Chain rule: d x' / d delta = (1 - tanh^2) / 2 = 2 x' (1 - x')."""
        return gradient * (2 * image * (1 - image))


class ProjectionSpace(Space):
    """``x' = x + delta``, clipped to [0, 1] after each step."""

    def image(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """Perturbed images in [0, 1]; the clip only removes rounding, :meth:`restrict` keeps the sum inside."""
        return (anchor + delta).clamp(0, 1)

    def pullback(self, image: Tensor, gradient: Tensor) -> Tensor:
        """The identity."""
        return gradient

    def restrict(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """Clip so that ``anchor + delta`` is in [0, 1]."""
        return (anchor + delta).clamp(0, 1) - anchor


class LinfBall(ProjectionSpace):
    """:class:`ProjectionSpace` within ``eps`` of every pixel, on the [0, 1] scale.

    Args:
        eps: radius, positive; 4/255 and 8/255 are usual.
    """

    def __init__(self, eps: float = 8 / 255) -> None:
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.eps = float(eps)

    def restrict(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """Clip to the ball, then to valid images."""
        return super().restrict(anchor, delta.clamp(-self.eps, self.eps))
