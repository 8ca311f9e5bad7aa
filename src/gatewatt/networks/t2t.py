"""The front of T2T-ViT: three overlapping cuts instead of one patch embedding, with attention in linear time between them.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (ICCV 2021), with its Performer blocks and fixed positions.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.networks.vit import Grid

Window = tuple[int, int, int]
"""Kernel, stride and padding of what cuts an image into patches."""

FRONT, DIRECTIONS = 64, 32  # width of the tokens inside the front, and random features of its attention
T2T_WINDOW: Window = (3, 2, 1)


def cut(side: int, window: Window) -> int:
    """Patches along a side."""
    kernel, stride, padding = window
    return (side + 2 * padding - kernel) // stride + 1


class Performer(nn.Module):
    """One block of the front: attention of one head in linear time, with random features in place of the softmax (Choromanski et al., 2021).

    The values, not the input, are what the attention is added to, since the block changes the width of its tokens.

    Args:
        inputs: channels of an input token.
        width: channels of an output token.
        dropout: after the attention and after the MLP.
    """

    directions: Tensor

    def __init__(self, inputs: int, width: int = FRONT, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.norm1, self.norm2 = nn.LayerNorm(inputs), nn.LayerNorm(width)
        self.kqv, self.projection = nn.Linear(inputs, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.Dropout(dropout))
        # Drawn once and never trained, so they belong to the weights. Of length sqrt(m), as in T2T-ViT's release.
        self.register_buffer("directions", nn.init.orthogonal_(torch.empty(DIRECTIONS, width)) * math.sqrt(DIRECTIONS))

    def forward(self, patches: Tensor) -> Tensor:
        """Tokens (B, N, inputs) to (B, N, width)."""
        key, query, value = self.kqv(self.norm1(patches)).split(self.width, dim=2)
        # In float32 whatever the training precision: the features are exponentials, and thousands of them are added up.
        with torch.autocast(patches.device.type, enabled=False):
            key, query = self.features(key), self.features(query)
            pairs = value.to(key.dtype).transpose(1, 2) @ key
            norms = query @ key.sum(1, keepdim=True).transpose(1, 2)
            attended = query @ pairs.transpose(1, 2) / (norms + 1e-8)
        tokens = value + self.dropout(self.projection(attended.to(value.dtype)))
        return tokens + self.mlp(self.norm2(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """Positive random features exp(w x - x^2 / 2) / sqrt(m), (B, N, m); their products stand in for exp(q k)."""
        tokens = tokens if tokens.dtype == torch.float64 else tokens.float()
        return torch.exp(functional.linear(tokens, self.directions) - tokens.square().sum(2, keepdim=True) / 2) / math.sqrt(len(self.directions))


class TokensToToken(nn.Module):
    """The front of T2T-ViT: overlapping patches become tokens, the map of tokens is cut into patches again, three times.

    Args:
        dim: channels of a token at the end.
        window: of the first cut; the other two have kernel 3, stride 2, padding 1.
    """

    def __init__(self, dim: int, window: Window) -> None:
        super().__init__()
        self.window = window
        self.first, self.second = Performer(3 * window[0] ** 2), Performer(FRONT * T2T_WINDOW[0] ** 2)
        self.projection = nn.Linear(FRONT * T2T_WINDOW[0] ** 2, dim)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, dim, rows, columns) of images (B, 3, H, W)."""
        features = images
        for window, layer in ((self.window, self.first), (T2T_WINDOW, self.second), (T2T_WINDOW, self.projection)):
            kernel, stride, padding = window
            grid = (cut(int(features.shape[2]), window), cut(int(features.shape[3]), window))
            tokens = layer(functional.unfold(features, kernel, stride=stride, padding=padding).transpose(1, 2))
            features = tokens.transpose(1, 2).unflatten(2, grid)
        return features


class SinusoidalPositions(nn.Module):
    """Fixed sines and cosines over the sequence of tokens, the class token being the first.

    Args:
        grid: of the patches that the table is kept for.
        dim: channels of a token.
    """

    table: Tensor

    def __init__(self, grid: Grid, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("table", sinusoids(1 + grid[0] * grid[1], dim), persistent=False)

    def forward(self, grid: Grid) -> Tensor:
        """(1, 1 + rows x columns, dim)."""
        count = 1 + grid[0] * grid[1]
        return self.table if count == self.table.shape[1] else sinusoids(count, self.dim).to(self.table)


def sinusoids(count: int, dim: int) -> Tensor:
    """Sines in even and cosines in odd channels, of position / 10000^(2 (channel // 2) / dim); (1, count, dim)."""
    # With NumPy, so that a table made for images of another size is a constant in a trace, as the kept one is.
    channels = np.arange(dim)
    angles = np.arange(count)[:, None] / 10000.0 ** (2 * (channels // 2) / dim)
    return torch.from_numpy(np.where(channels % 2 == 0, np.sin(angles), np.cos(angles)).astype(np.float32))[None]
