"""What the vision transformers share: attention that shows its logits, tokens with positions for any grid, stochastic depth, DeiT's first weights.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021), as trained by Touvron et al., "DeiT" (ICML 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

Grid = tuple[int, int]
"""Rows and columns of patches."""


def attend(qkv: Tensor, heads: int, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """softmax(Q K^T / sqrt(width) + added) V of every head.

    Plain matrix products rather than fused attention, which torch's dispatcher counter does not count on every device.

    Args:
        qkv: queries, keys and values of each token side by side, (B, T, 3 D).
        heads: number of heads, a divisor of D; each has D / heads channels, its width.
        added: to the logits of all heads; broadcastable to (B, heads, T, T).

    Returns:
        The mixed values (B, T, D), and the logits (B, heads, T, T) with what was added.
    """
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    if added is not None:
        logits = logits + added
    return (logits.softmax(3) @ value).transpose(1, 2).flatten(2), logits


def sequence(patches: Tensor, class_token: Tensor, positions: Tensor) -> Tensor:
    """Class token (1, 1, D), then patches (B, D, rows, columns) row by row, plus positions: (B, 1 + rows x columns, D)."""
    tokens = patches.flatten(2).transpose(1, 2)
    return torch.cat([class_token.expand(len(tokens), -1, -1).to(tokens.dtype), tokens], dim=1) + positions


def positions_at(grid: Grid, table: Tensor, kept: Grid) -> Tensor:
    """Learned positions (1, 1 + rows x columns, D) for ``grid``; those of patches are interpolated bilinearly if the table is of another grid.

    Args:
        grid: wanted.
        table: (1, 1 + N, D), the class token's first.
        kept: the grid that the table is of, N patches.
    """
    if grid == kept:
        return table
    patches = table[:, 1:].transpose(1, 2).unflatten(2, kept)
    resized = functional.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    return torch.cat([table[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


def early_convolutions(channels: int) -> nn.Sequential:
    """Two 3x3 convolutions in front of the patches, the first with stride 2: (B, 3, H, W) -> (B, channels, H / 2, W / 2).

    Vision transformers learn faster behind a few convolutions (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021).
    """
    layers: list[nn.Module] = []
    for inputs, stride in ((3, 2), (channels, 1)):
        layers += [nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers)


def drop_paths(last: float, depth: int) -> list[StochasticDepth]:
    """Stochastic depth of each of ``depth`` blocks: in training an image misses a branch with a probability that rises linearly from 0 to ``last``.

    Raises:
        ValueError: if ``last`` is outside [0, 1).

    Example:
        >>> [drop.p for drop in drop_paths(0.1, 3)]
        [0.0, 0.05, 0.1]
    """
    if not 0 <= last < 1:
        raise ValueError(f"drop_path must be in [0, 1), got {last}")
    return [StochasticDepth(last * index / max(depth - 1, 1), mode="row") for index in range(depth)]


def initialize_linear(network: nn.Module) -> None:
    """DeiT's first weights of every linear layer: truncated normal with deviation 0.02, biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
