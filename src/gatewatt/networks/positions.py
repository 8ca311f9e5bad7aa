"""Convolutions at some positions of a batch of maps, at exactly their share of the price: gather, multiply, scatter.

Maps are handled as rows, one per position, (BHW, C): what memory in channels_last holds as it is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


def as_rows(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (BHW, C), without a copy for channels_last."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def replace_rows(features: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """``features`` with the rows at ``index`` replaced, in place where no gradient is due: nobody reads the old ones again."""
    rows = rows.to(features.dtype)
    return features.index_copy(0, index, rows) if torch.is_grad_enabled() else features.index_copy_(0, index, rows)


class Positions(NamedTuple):
    """Some positions of a batch of maps, P in all.

    Attributes:
        shape: (B, H, W) of the maps.
        flat: index of each position among all BHW, (P,).
        image: index of its image, (P,).
        neighbours: indices of its 3x3 neighbourhood in the maps padded by one pixel on each side, (9P,).
    """

    shape: tuple[int, int, int]
    flat: Tensor
    image: Tensor
    neighbours: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> Positions:
        """The positions where ``mask`` (B, H, W) is not zero."""
        images, height, width = mask.shape
        image, row, column = mask.nonzero().unbind(1)
        corner = (image * (height + 2) + row) * (width + 2) + column
        step = torch.arange(3, device=mask.device)
        window = (step[:, None] * (width + 2) + step).flatten()
        return cls((images, height, width), (image * height + row) * width + column, image, (corner[:, None] + window).flatten())

    def patches(self, rows: Tensor) -> Tensor:
        """The 3x3 neighbourhoods in maps given as rows (BHW, C), zeros beyond the border: (P, 9C), channels last."""
        padded = functional.pad(rows.view(*self.shape, -1), (0, 0, 1, 1, 1, 1)).flatten(0, 2)
        return padded.index_select(0, self.neighbours).view(len(self.flat), -1)


class PositionConv(nn.Module):
    """A convolution with "same" padding and what follows it, for whole images or at some positions only, at the same price per position.

    Args:
        inputs: channels in.
        outputs: channels out.
        kernel: 1 or 3.
        stride: of whole images; positions need 1.
        behind: normalisation and activation of the result; a convolution without any has a bias.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, behind: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        # A plain sequence: attacks fold BatchNorm into the convolution before it.
        self.layers = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=not behind), *behind)
        self.kernel = kernel

    def forward(self, features: Tensor, where: Positions | None = None) -> Tensor:
        """Whole maps, or some positions of stride-1 maps.

        Args:
            features: maps (B, C, H, W); with ``where`` rows, of all positions (BHW, C) for a 3x3 kernel, of these positions (P, C) for 1x1.
            where: the positions to compute.

        Returns:
            Maps (B, O, H, W); with ``where`` rows (P, O).
        """
        if where is None:
            return self.layers(features)
        convolution, *behind = self.layers
        assert isinstance(convolution, nn.Conv2d)
        weight = convolution.weight.permute(0, 2, 3, 1).flatten(1)
        rows = functional.linear(where.patches(features) if self.kernel == 3 else features, weight, convolution.bias)
        for layer in behind:
            rows = layer(rows[:, :, None, None])[:, :, 0, 0]
        return rows

    def extent(self, features: Tensor, where: Positions | None = None) -> tuple[int, int]:
        """Images computed of 1, or positions computed of those of one image."""
        return (len(features), 1) if where is None else (len(where.flat), where.shape[1] * where.shape[2])


def dilate(mask: Tensor) -> Tensor:
    """Maximum over the 3x3 neighbourhood of each position of (B, H, W)."""
    return functional.max_pool2d(mask[:, None], 3, 1, 1)[:, 0]
