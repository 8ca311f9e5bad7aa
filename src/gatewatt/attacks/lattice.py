"""8-bit images in the loop: what an attack makes is, to the last bit, what a PNG file holds.

Rounding a finished attack undoes it where its changes are below half a level (a mean squared error of 1/12 of a squared level and less). Here every
image that the network sees during the attack is rounded already, gradients pass straight through the rounding, and iterates are judged as they
would be saved.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gatewatt.attacks.spaces import Ball, Space

LEVELS = 255
SNAP = 1e-4
"""A change this near to a whole number of levels is one: float32 keeps 255 x to about 3e-5."""


def whole_levels(change: Tensor, start: Tensor, reach: float = math.inf) -> Tensor:
    """Whole changes in place of fractional ones, of the same Euclidean length or a little shorter.

    Every change is first rounded towards none. Then changes are rounded up, those that were cut by most first, for as long as the whole
    perturbation of an image stays no longer than it was. Rounding to the nearest level would return small perturbations to nothing; this
    keeps a few of their pixels, at the same squared error.

    Args:
        change: in levels, (B, 3, H, W).
        start: the level that each change starts from, 0..255, same shape.
        reach: largest change of a pixel in levels.

    Returns:
        Whole numbers, same shape, such that ``start`` plus them is in 0..255.

    Example:
        >>> change = torch.tensor([0.9, 0.2, -1.7, 0.4]).view(1, 1, 2, 2)
        >>> whole_levels(change, torch.full((1, 1, 2, 2), 9.0)).flatten().tolist()
        [1.0, 0.0, -1.0, 0.0]
    """
    nearest = change.round()
    change = torch.where((change - nearest).abs() < SNAP, nearest, change)
    shorter = change.trunc()
    longer = shorter + change.sign()
    possible = (change != shorter) & (longer.abs() <= reach + SNAP) & (start + longer >= 0) & (start + longer <= LEVELS)
    # float64: the sum of a million squares must not lose a single level.
    cut = torch.where(possible, (change - shorter).abs(), 0.0).flatten(1)
    price = torch.where(possible, longer.square() - shorter.square(), 0.0).flatten(1).double()
    left = (change.double().square() - shorter.double().square()).flatten(1).sum(1, keepdim=True)
    # Stable, so that an image is rounded alike alone and in a batch.
    order = cut.argsort(dim=1, descending=True, stable=True)
    affordable = price.gather(1, order).cumsum(1) <= left
    up = torch.zeros_like(affordable).scatter(1, order, affordable).view_as(possible) & possible
    return torch.where(up, longer, shorter)


class Lattice(Space):
    """Another space, of which only the 8-bit images are used: exact multiples of 1/255.

    Perturbations are rounded by :func:`whole_levels`, so an image is no further from the clean one than without rounding: what is inside a ball
    stays inside. The gradient is taken at the rounded image and passed on as if there had been no rounding.

    Args:
        space: the space (for the attacks that need a ball: :class:`LatticeBall`).

    Raises:
        ValueError: on use, if the clean images are not multiples of 1/255 themselves.
    """

    def __init__(self, space: Space) -> None:
        self.space = space

    def image(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """8-bit images (B, 3, H, W); ``anchor`` are the clean ones, and ``delta = 0`` gives them to the last bit."""
        start = (LEVELS * anchor).round()
        if bool(((LEVELS * anchor - start).abs() > SNAP).any()):
            raise ValueError("an attack on 8-bit images starts from 8-bit images, multiples of 1/255; these are not: round them first")
        encoded = self.space.encode(anchor)
        change = LEVELS * (self.space.image(encoded, delta) - self.space.image(encoded, torch.zeros_like(delta)))
        return (start + whole_levels(change, start, self.reach)) / LEVELS

    @property
    def reach(self) -> float:
        """Largest change of a pixel in levels: the radius of an L-inf ball."""
        return LEVELS * self.space.eps if isinstance(self.space, Ball) and self.space.order == math.inf else math.inf

    def unit(self, image: Tensor) -> float | Tensor:
        """The inner space's."""
        return self.space.unit(image)

    def pullback(self, image: Tensor, gradient: Tensor) -> Tensor:
        """The inner space's, as if ``image`` had not been rounded."""
        # What was rounded to black or white was on average a quarter of a level away, and a tanh has no slope at the very end.
        return self.space.pullback(image.clamp(0.25 / LEVELS, 1 - 0.25 / LEVELS), gradient)

    def restrict(self, anchor: Tensor, delta: Tensor) -> Tensor:
        """The inner space's."""
        return self.space.restrict(self.space.encode(anchor), delta)


class LatticeBall(Lattice, Ball):
    """The 8-bit images of a ball.

    Args:
        space: the ball. In an L-inf ball below one level (1/255) there is only the clean image.
    """

    space: Ball

    def __init__(self, space: Ball) -> None:
        Ball.__init__(self, space.eps)
        self.space = space

    @property
    def order(self) -> float:
        """Of the ball's norm."""
        return self.space.order

    def ball(self, delta: Tensor) -> Tensor:
        """The inner ball's."""
        return self.space.ball(delta)

    def steepest(self, gradient: Tensor) -> Tensor:
        """The inner ball's."""
        return self.space.steepest(gradient)

    def within(self, noise: Tensor) -> Tensor:
        """The inner ball's."""
        return self.space.within(noise)

    def scaled(self, share: float) -> LatticeBall:
        """The 8-bit images of the inner ball, scaled."""
        return LatticeBall(self.space.scaled(share))
