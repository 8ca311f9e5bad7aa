"""Where a perturbation lives, and how it becomes a valid image.

A space maps the variable ``delta`` to an image in [0, 1] and pulls an image gradient back to ``delta``; both analytically, so that the
network's graph is the only one.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from gatewatt.networks.layers import CIFAR_MEAN, CIFAR_STD


class Space(ABC):
    """A parametrisation of valid images around given ones."""

    def encode(self, images: Tensor) -> Tensor:
        """The fixed anchor that ``delta`` is added to, shape (B, 3, H, W); the images themselves unless a space says otherwise."""
        return images

    @abstractmethod
    def image(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """The perturbed images in [0, 1], shape (B, 3, H, W); ``delta = 0`` gives the encoded images."""

    def unit(self, image: Tensor) -> float | Tensor:
        """What counts as 1 in a squared error, on the [0, 1] scale: a number, or one per channel in the dtype and on the device of ``image``."""
        return 1.0

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


class StandardizedTanhSpace(Space):
    """``x' = (tanh(0.8 (s + delta)) + 1) / 2`` with s the image less its mean, by its standard deviation: the map of GradMDM's release.

    No identity: ``delta = 0`` already gives another image, about 20 dB from the clean one on CIFAR-10, which the penalty pulls back during the
    attack. Squared errors count in units of the standard deviations. The release scales the tanh to CIFAR-10's range of standardised values, on
    ImageNet too, where images leave [0, 1]; here it is the range of the statistics given, which is [0, 1] itself.

    Args:
        mean: of each channel, on the [0, 1] scale (CIFAR-10's when left out).
        std: standard deviation of each channel, positive.
    """

    slope = 0.8

    def __init__(self, mean: Sequence[float] = CIFAR_MEAN, std: Sequence[float] = CIFAR_STD) -> None:
        if len(mean) != 3 or len(std) != 3 or not all(0 < value < math.inf for value in std):
            raise ValueError(f"mean and std must have three entries and std be positive, got {tuple(mean)} and {tuple(std)}")
        self.mean, self.std = tuple(float(value) for value in mean), tuple(float(value) for value in std)

    def encode(self, images: Tensor) -> Tensor:
        """Standardised images."""
        return (images - images.new_tensor(self.mean).view(-1, 1, 1)) / self.unit(images)

    def unit(self, image: Tensor) -> Tensor:
        """The standard deviations, (3, 1, 1)."""
        return image.new_tensor(self.std).view(-1, 1, 1)

    def image(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """Perturbed images in [0, 1]."""
        return (torch.tanh(self.slope * (anchor + delta)) + 1) / 2

    def pullback(self, image: Tensor, gradient: Tensor) -> Tensor:
        """Chain rule: d x' / d delta = 0.8 (1 - tanh^2) / 2."""
        return gradient * (self.slope * 2 * image * (1 - image))


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


class Ball(ProjectionSpace):
    """:class:`ProjectionSpace` within a ball around the images.

    Args:
        eps: radius on the [0, 1] scale, positive.
    """

    def __init__(self, eps: float) -> None:
        if not 0 < eps < math.inf:
            raise ValueError(f"eps must be finite and positive, a radius on the [0, 1] scale, got {eps}")
        self.eps = float(eps)

    @property
    @abstractmethod
    def order(self) -> float:
        """Of the norm: 2 or infinity."""

    @abstractmethod
    def ball(self, delta: Tensor) -> Tensor:
        """The point of the ball that is nearest to ``delta`` (B, 3, H, W)."""

    @abstractmethod
    def steepest(self, gradient: Tensor) -> Tensor:
        """The direction of norm 1 that descends fastest, per image; zeros where there is no gradient."""

    @abstractmethod
    def within(self, noise: Tensor) -> Tensor:
        """A point of the ball from uniform ``noise`` in [0, 1) (B, 3, H, W): where a descent may start."""

    def restrict(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """Bring ``delta`` into the ball, then to valid images."""
        return super().restrict(anchor, self.ball(delta))

    def scaled(self, share: float) -> Ball:
        """The same kind of ball with ``share`` times the radius."""
        ball = copy.copy(self)
        ball.eps = share * self.eps
        return ball


class LinfBall(Ball):
    """Within ``eps`` of every pixel; 4/255 and 8/255 are usual."""

    def __init__(self, eps: float = 8 / 255) -> None:
        super().__init__(eps)

    @property
    def order(self) -> float:
        """Infinity."""
        return math.inf

    def ball(self, delta: Tensor) -> Tensor:
        """Clip every pixel."""
        return delta.clamp(-self.eps, self.eps)

    def steepest(self, gradient: Tensor) -> Tensor:
        """Minus the sign."""
        return -gradient.sign()

    def within(self, noise: Tensor) -> Tensor:
        """Uniform in the ball."""
        return self.eps * (2 * noise - 1)


class L2Ball(Ball):
    """Within Euclidean distance ``eps`` of the image as a vector of 3HW pixels; 0.5 and 1 are usual at 32x32."""

    def __init__(self, eps: float = 0.5) -> None:
        super().__init__(eps)

    @property
    def order(self) -> float:
        """Two."""
        return 2

    def ball(self, delta: Tensor) -> Tensor:
        """Shrink what is too long."""
        return delta * (self.eps / image_norm(delta).clamp_min(self.eps))

    def steepest(self, gradient: Tensor) -> Tensor:
        """Minus the unit vector."""
        return -unit_length(gradient)

    def within(self, noise: Tensor) -> Tensor:
        """A direction by chance, as far as the surface: in thousands of dimensions nearly all of a ball is there."""
        return self.eps * unit_length(torch.special.ndtri(noise.clamp(1e-6, 1 - 1e-6)))


def image_norm(tensor: Tensor) -> Tensor:
    """Euclidean norm of each image of (B, 3, H, W), shape (B, 1, 1, 1)."""
    return tensor.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def unit_length(tensor: Tensor) -> Tensor:
    """Each image of (B, 3, H, W) scaled to Euclidean norm 1; zeros stay zeros.

    Gradients of deep gates can be below 1e-20, whose square float32 cannot hold: the largest value is scaled to 1 before anything is squared.
    """
    scaled = tensor / tensor.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny)
    # At least 1 where there is a value; what is below the smallest normal number counts as nothing.
    return scaled / image_norm(scaled).clamp_min(0.5)
