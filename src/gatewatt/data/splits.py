"""Seeded splits and subsets, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from gatewatt.data.order import generator


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Split positions in two so that each class keeps its share.

    Every class gives its rounded-down share of ``count``; what is missing comes from the classes with the largest remainder, the lower class
    first among equals.

    Args:
        labels: int64 (N,).
        count: images of the second part, 0 to N.
        seed: seed of the choice within each class.

    Returns:
        The positions of the first (N - count,) and of the second part (count,), both ascending.

    Raises:
        ValueError: if ``count`` is negative or above N.

    Example:
        >>> rest, part = stratified(torch.tensor([0, 0, 1, 1, 1, 1]), 3, seed=0)
        >>> torch.tensor([0, 0, 1, 1, 1, 1])[part].tolist()
        [0, 1, 1]
    """
    if not 0 <= count <= len(labels):
        raise ValueError(f"cannot split {count} of {len(labels)} images off; choose 0 to {len(labels)}")
    classes, sizes = labels.unique(return_counts=True)
    shares, remainders = sizes * count // len(labels), sizes * count % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: count - int(shares.sum())]] += 1
    taken = torch.zeros(len(labels), dtype=torch.bool)
    for label, size, share in zip(classes.tolist(), sizes.tolist(), shares.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        taken[members[torch.randperm(size, generator=generator(seed, "split", label))[:share]]] = True
    return (~taken).nonzero().flatten(), taken.nonzero().flatten()


def subset(images: int, count: int | None, seed: int, offset: int = 0) -> Tensor:
    """Positions to evaluate: all of them in order, or ``count`` of a seeded permutation from ``offset`` on.

    A smaller subset is the beginning of a larger one. One that begins where another ends shares no image with it.

    Args:
        images: N, the images there are.
        count: the images to evaluate; None for all that there are, without an offset in their own order.
        seed: seed of the permutation.
        offset: images of the permutation to leave out before the first.

    Raises:
        ValueError: if there are fewer than ``count`` images behind ``offset``, or none.

    Example:
        >>> first, second = subset(10, 4, seed=0), subset(10, 4, seed=0, offset=4)
        >>> set(first.tolist()) & set(second.tolist())
        set()
    """
    if count is None and not offset:
        return torch.arange(images)
    left = max(0, images - offset)
    if left < (count or 1):
        behind = f" behind the first {offset}" if offset else ""
        raise ValueError(f"a subset of {count or 'all'} images{behind} was asked for, there are {left}; ask for at most {left}")
    return torch.randperm(images, generator=generator(seed, "subset"))[offset:][:count]
