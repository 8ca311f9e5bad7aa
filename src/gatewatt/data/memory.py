"""Small data sets live in memory as uint8 and are cropped and flipped as whole batches.

A batch of 128 images of 32x32 costs about a millisecond on one core this way, so no worker processes are needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.data.batch import Batch, BatchKey, Images
from gatewatt.data.distortion import Distortion
from gatewatt.data.order import generator, lent


@dataclass(frozen=True)
class Augmentation:
    """Random crop from the image padded with black, random horizontal flip, and what distorts it further, each drawn per image.

    Args:
        crop_padding: pixels added on each side before cropping to the old size; 0 leaves the position alone.
        flip: flip half of the images.
        distortion: what follows; the images must then be uint8, and at 32x32 each takes half a millisecond: use worker processes.
    """

    crop_padding: int = 4
    flip: bool = True
    distortion: Distortion | None = None

    def __post_init__(self) -> None:
        """Refuse a negative padding."""
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0 (0 switches cropping off), got {self.crop_padding}")

    def draw(self, count: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Row offsets (B,), column offsets (B,) and flips, bool (B,), of ``count`` images: the first that ``source`` is asked for."""
        rows, columns = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=source)
        flipped = torch.randint(0, 2, (count,), generator=source).bool() if self.flip else torch.zeros(count, dtype=torch.bool)
        return rows, columns, flipped

    def __call__(self, images: Tensor, source: torch.Generator) -> Tensor:
        """Augment (B, C, H, W) of any type with draws from ``source``: crops, flips, then what distorts image by image."""
        count, _, height, width = images.shape
        padding = self.crop_padding
        rows, columns, flipped = self.draw(count, source)
        if padding:
            # A view of every window; indexing it copies only the chosen ones.
            windows = functional.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
            images = windows[torch.arange(count), :, rows, columns]
        if self.flip:
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        if self.distortion is not None:
            with lent(source):
                images = torch.stack([self.distortion(image) for image in images])
        return images


@dataclass(frozen=True)
class MemoryImages(Images):
    """A split in memory; indexed with a whole batch's key.

    Args:
        images: uint8 (N, 3, H, W).
        labels: int64 (N,).
        augmentation: applied to the uint8 pixels, None in evaluation.
    """

    images: Tensor
    labels: Tensor
    augmentation: Augmentation | None = None

    def at(self, indices: Tensor) -> MemoryImages:
        """The images at these positions as a split of its own."""
        return MemoryImages(self.images[indices], self.labels[indices], self.augmentation)

    def augmented(self, augmentation: Augmentation | None) -> MemoryImages:
        """The same images with this augmentation."""
        return replace(self, augmentation=augmentation)

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of ``key``."""
        images = self.images[key.indices]
        if self.augmentation is not None:
            images = self.augmentation(images, generator(key.seed, "augmentation", key.epoch, key.number))
        return Batch(images.float().div_(255), self.labels[key.indices], key.indices)
