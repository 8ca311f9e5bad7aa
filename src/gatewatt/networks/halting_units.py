"""Residual units, their halting heads, and running both for what of a batch has not halted: what SACT and ACT are built of.

A unit and a head compute whole images, or some positions of them (:mod:`gatewatt.networks.positions`). What still runs of a batch is a value that
knows how to take the next step: :class:`Whole`, :class:`Nothing`, :class:`RunningImages` or :class:`RunningPositions`, one interface for all.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.gating import Execution
from gatewatt.networks.layers import global_average
from gatewatt.networks.positions import PositionConv, Positions, as_rows, dilate, replace_rows

# ---- residual units ----


class Style(NamedTuple):
    """Conventions of the CIFAR and of the ImageNet network."""

    imagenet: bool

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """BatchNorm with the original's epsilon and decay: 0.9 for CIFAR, 0.997 for ImageNet (torch's momentum is 1 - decay)."""
        return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.003) if self.imagenet else nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)

    def activation(self) -> nn.Module:
        """ReLU, or for CIFAR a leaky ReLU of slope 0.1."""
        return nn.ReLU(inplace=True) if self.imagenet else nn.LeakyReLU(0.1, inplace=True)

    def normed(self, channels: int) -> tuple[nn.Module, nn.Module]:
        """BatchNorm and activation."""
        return self.norm(channels), self.activation()


class Subsample(nn.Module):
    """A shortcut without weights: the average of ``stride`` x ``stride`` pixels, and zeros for the new channels, half of them in front."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        front = (outputs - inputs) // 2
        self.stride, self.channels = stride, (front, outputs - inputs - front)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to fewer pixels and more channels."""
        # What lies beyond the border of an odd side does not count.
        pooled = functional.avg_pool2d(features, self.stride, ceil_mode=True, count_include_pad=False)
        return functional.pad(pooled, (0, 0, 0, 0, *self.channels))


class Unit(nn.Module):
    """A pre-activation residual unit, ``shortcut + convs(act(norm(x)))``.

    Args:
        inputs: channels in.
        width: channels of the 3x3 convolutions.
        stride: spatial stride.
        style: CIFAR (3x3, 3x3) or ImageNet (1x1, 3x3, 1x1 with four times ``width`` out).
        opening: the very first unit, whose input nothing has activated yet.
    """

    def __init__(self, inputs: int, width: int, stride: int, style: Style, opening: bool) -> None:
        super().__init__()
        self.outputs = 4 * width if style.imagenet else width
        self.preactivation = nn.Sequential(*style.normed(inputs))
        if style.imagenet:
            first, second = PositionConv(inputs, width, 1, 1, style.normed(width)), PositionConv(width, width, 3, stride, style.normed(width))
            self.convs = nn.Sequential(first, second, PositionConv(width, self.outputs, 1))
        else:
            self.convs = nn.Sequential(PositionConv(inputs, width, 3, stride, style.normed(width)), PositionConv(width, width, 3))
        # Whether the shortcut starts at the activated input or at the input itself.
        self.activated, self.shortcut = opening, nn.Identity()
        if style.imagenet and inputs != self.outputs:
            self.activated, self.shortcut = True, nn.Conv2d(inputs, self.outputs, 1, stride)
        elif stride != 1 or inputs != self.outputs:
            self.shortcut = Subsample(inputs, self.outputs, stride)

    shortcut: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        """The whole unit, as a static network runs it."""
        activated = self.preactivation(features)
        return self.shortcut(activated if self.activated else features) + self.convs(activated)

    def residual(self, features: Tensor) -> Tensor:
        """What any unit of a block but its first adds to its input (B, C, H, W)."""
        return self.convs(self.preactivation(features))

    def residual_at(self, features: Tensor, where: Positions, dilated: Positions) -> Tensor:
        """The same at some positions only, as rows (P, C).

        Args:
            features: (B, C, H, W).
            where: the positions.
            dilated: the positions and their neighbours: what the 3x3 convolution behind the first one reads.
        """
        first, second, *others = self.layers
        rows = as_rows(self.preactivation(features))
        computed = first(rows if first.kernel == 3 else rows.index_select(0, dilated.flat), dilated)
        hidden = computed.new_zeros(len(rows), computed.shape[1]).index_copy(0, dilated.flat, computed)
        result: Tensor = second(hidden, where)
        for convolution in others:
            result = convolution(result, where)
        return result

    @property
    def layers(self) -> list[PositionConv]:
        """The convolutions in order."""
        return list(self.convs)  # type: ignore[arg-type]


# ---- halting heads ----


class ImageHalting(nn.Module):
    """ACT's head: global mean, BatchNorm (and on CIFAR the activation), one linear score of the image."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        norm = style.norm(channels)
        self.norm = nn.BatchNorm1d(channels, norm.eps, norm.momentum)
        self.activation = nn.Identity() if style.imagenet else style.activation()
        self.project = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Halting logits (B, 1)."""
        return self.project(self.activation(self.norm(global_average(features))))


class PositionHalting(nn.Module):
    """SACT's head: a 3x3 convolution of the normalised maps, plus a linear score of their normalised mean that all positions share."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.norm = style.norm(channels)
        self.local = PositionConv(channels, 1, 3)
        self.mean_norm = nn.BatchNorm1d(channels, self.norm.eps, self.norm.momentum)
        self.overall = nn.Linear(channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Halting logits (B, HW)."""
        return self.local(self.norm(features)).flatten(1) + self.overall(self.mean_norm(global_average(features)))

    def at(self, features: Tensor, where: Positions, images: Tensor) -> Tensor:
        """The same at some positions only, (P,).

        Args:
            features: (B, C, H, W).
            where: the positions.
            images: indices of the images that have any of them.
        """
        local = self.local(as_rows(self.norm(features)), where)[:, 0]
        overall = self.overall(self.mean_norm(global_average(features[images])))[:, 0]
        return local + overall.new_zeros(len(features)).index_copy(0, images, overall)[where.image]


Head = PositionHalting | ImageHalting


# ---- what still runs of a batch ----


class Whole:
    """Everything is computed; in masked execution, what halted keeps its state.

    Args:
        mask: 0 or 1, (B, 1, H, W) or (B, 1, 1, 1); None where everything runs.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """Add the unit's residual to the features."""
        residual = unit.residual(features)
        return features + residual if self.mask is None else torch.addcmul(features, self.mask.to(features.dtype), residual)

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits (B, U)."""
        return head(features)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """Add the features, weighted (B, 1, H, W) or (B, 1, 1, 1), to the average."""
        weight = weight.to(features.dtype)
        # Fused where no trace counts operators: the FLOP tables do not know it.
        return average + weight * features if self.mask is None else torch.addcmul(average, weight, features)


class Nothing:
    """Everything has halted: called like :class:`Whole`, computes nothing."""

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits of scores that are 0, for all units alike."""
        return features.new_full((len(features), 1), -torch.inf)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """The average as it is."""
        return average


class RunningImages:
    """Some images still run: called like :class:`Whole`, computes these images.

    Args:
        rows: their indices.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """Gather the images, add the unit's residual, put them back."""
        gathered = features[self.rows]
        return replace_rows(features, self.rows, gathered + unit.residual(gathered))

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits (B, 1); minus infinity, a score of 0, for the others."""
        logits = head(features[self.rows])
        return logits.new_full((len(features), 1), -torch.inf).index_copy(0, self.rows, logits)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """Add these images, weighted."""
        share = weight[self.rows].to(average.dtype)
        return replace_rows(average, self.rows, average[self.rows] + share * features[self.rows])


class RunningPositions:
    """Some positions still run: called like :class:`Whole`, computes these positions.

    Args:
        running: 0 or 1, (B, H, W).
    """

    def __init__(self, running: Tensor) -> None:
        self.where, self.dilated = Positions.of(running), Positions.of(dilate(running))
        self.images = running.flatten(1).max(1).values.nonzero()[:, 0]

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """Add the unit's residual at the positions."""
        rows, index = as_rows(features), self.where.flat
        residual = unit.residual_at(features, self.where, self.dilated)
        return self.maps(replace_rows(rows, index, rows.index_select(0, index) + residual))

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits (B, HW); minus infinity, a score of 0, elsewhere."""
        assert isinstance(head, PositionHalting)
        images, height, width = self.where.shape
        logits = head.at(features, self.where, self.images)
        return logits.new_full((images * height * width,), -torch.inf).index_copy(0, self.where.flat, logits).view(images, -1)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """Add the features at the positions, weighted."""
        rows, index = as_rows(average), self.where.flat
        share = weight.flatten().index_select(0, index).to(rows.dtype)[:, None]
        seen = as_rows(features).index_select(0, index)
        return self.maps(replace_rows(rows, index, rows.index_select(0, index) + share * seen))

    def maps(self, rows: Tensor) -> Tensor:
        """Rows of all positions as maps (B, C, H, W) in channels_last."""
        return rows.view(*self.where.shape, -1).permute(0, 3, 1, 2)


Part = Whole | Nothing | RunningImages | RunningPositions


def still_running(running: Tensor, spatial: bool, execution: Execution) -> Part:
    """What runs of the next unit.

    Args:
        running: 0 or 1, (B, H, W), or (B, 1, 1) per image.
        spatial: whether positions halt, or images.
        execution: masked, dense or skipped.
    """
    if execution != "skipped":
        return Whole(running[:, None] if execution == "masked" else None)
    places = running.nonzero()
    if len(places) == 0:
        return Nothing()
    if len(places) == running.shape[0] * running.shape[1] * running.shape[2]:
        return Whole()
    return RunningPositions(running) if spatial else RunningImages(places[:, 0])
