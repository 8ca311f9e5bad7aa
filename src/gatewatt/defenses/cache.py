"""Perturbations kept from epoch to epoch, so that an attack in the training loop goes on where it stopped instead of starting anew.

Zheng et al., "Efficient Adversarial Training with Transferable Adversarial Examples" (CVPR 2020), for accuracy. Kept in the coordinates of the
image on disk: the next epoch crops and flips it otherwise.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Crops(NamedTuple):
    """How each image of a batch was cut from its original.

    Attributes:
        rows: first row in the original padded by ``padding``, (B,).
        columns: first column, (B,).
        flipped: whether it was flipped left to right after that, bool (B,).
        padding: pixels added on each side.
    """

    rows: Tensor
    columns: Tensor
    flipped: Tensor
    padding: int


class PerturbationCache:
    """The last perturbation of every training image, as int8 in units of 1/255: 3 kB an image of CIFAR-10, in the memory of the process.

    Args:
        restart: share of the images in each batch that start afresh all the same, so that no perturbation grows stale for ever.
        epochs: forget everything each time so many epochs are over.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, *, restart: float = 0.2, epochs: int = 10) -> None:
        if not 0 <= restart < 1:
            raise ValueError(f"restart must be in [0, 1), a share of the images, got {restart}")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self.restart, self.epochs = restart, epochs
        self.kept: Tensor | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Forget what is due to be forgotten."""
        if epoch % self.epochs == 0:
            self.kept = None

    def start(self, ids: Tensor, crops: Crops, fresh: Tensor) -> Tensor:
        """Where to start from, (B, 3, H, W): the perturbations as these crops show them; restarts, and images of which nothing is kept, afresh.

        Args:
            ids: positions of the images in their split, (B,).
            crops: how they were cut.
            fresh: perturbations to start from afresh, (B, 3, H, W), of the batch's shape, dtype and device; zeros are the images themselves.
        """
        cold = torch.rand(len(ids)) < self.restart
        if self.kept is None:
            return fresh
        canvas = self._canvas(self._at(ids), crops.padding)
        shown = canvas[_window(crops, fresh.shape)].permute(0, 3, 1, 2)
        shown = torch.where(crops.flipped[:, None, None, None], shown.flip(-1), shown)
        cold = cold | (shown == 0).flatten(1).all(1)
        return torch.where(cold.to(fresh.device)[:, None, None, None], fresh, shown.to(fresh) / 255)

    def keep(self, ids: Tensor, crops: Crops, perturbation: Tensor) -> None:
        """Write down what an attack found, (B, 3, H, W); what the crops do not show stays as it was."""
        levels = (255 * perturbation.detach().float()).round().clamp(-127, 127).to("cpu", torch.int8)
        levels = torch.where(crops.flipped[:, None, None, None], levels.flip(-1), levels)
        height, width = levels.shape[2:]
        self._make_room(int(ids.max()) + 1, levels)
        assert self.kept is not None
        canvas = self._canvas(self._at(ids), crops.padding)
        canvas[_window(crops, levels.shape)] = levels.permute(0, 2, 3, 1)
        inner = slice(crops.padding, crops.padding + height), slice(crops.padding, crops.padding + width)
        self.kept[ids.cpu()] = canvas[:, inner[0], inner[1]].permute(0, 3, 1, 2)

    def state_dict(self) -> dict[str, Any]:
        """What is kept, for a checkpoint."""
        return {"kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.kept = state["kept"]

    def _at(self, ids: Tensor) -> Tensor:
        """What is kept of these images; zeros of those not met yet."""
        assert self.kept is not None
        ids = ids.cpu()
        there = ids < len(self.kept)
        return self.kept[ids.clamp(max=len(self.kept) - 1)] * there[:, None, None, None]

    @staticmethod
    def _canvas(levels: Tensor, padding: int) -> Tensor:
        """Padded with zeros, channels last."""
        return functional.pad(levels, (padding,) * 4).permute(0, 2, 3, 1).contiguous()

    def _make_room(self, count: int, like: Tensor) -> None:
        have = 0 if self.kept is None else len(self.kept)
        if count > have:
            grown = torch.zeros(max(count, 2 * have), *like.shape[1:], dtype=torch.int8)
            if self.kept is not None:
                grown[:have] = self.kept
            self.kept = grown


def _window(crops: Crops, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of every pixel of the crops in their padded originals (B, H + 2p, W + 2p, C), each broadcast to (B, H, W)."""
    count, _, height, width = shape
    rows = crops.rows[:, None] + torch.arange(height)
    columns = crops.columns[:, None] + torch.arange(width)
    return torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
