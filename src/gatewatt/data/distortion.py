"""Strong augmentation of training images, and of whole batches, over torchvision: RandAugment, colours, erasing; mixup and CutMix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

MEAN_COLOR = (124, 116, 104)  # of ImageNet; nothing is left of it after normalisation


@dataclass(frozen=True)
class Distortion:
    """What is done to a training image after crop and flip. Each is left out by default.

    Args:
        rand_augment: magnitude of RandAugment (Cubuk et al., 2020), 0 to 10, two operations per image; 9 for DeiT and T2T-ViT. Their library
            also varies the magnitude a little and leaves half of the operations out; torchvision's does not.
        color: brightness, contrast, saturation and hue as for Inception, which SACT follows.
        erasing: share of the images of which a rectangle is painted over (Zhong et al., 2020), in ImageNet's mean colour; 0.25 for DeiT.

    Raises:
        ValueError: for a value out of range.
    """

    rand_augment: int | None = None
    color: bool = False
    erasing: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.rand_augment is not None and not 0 <= self.rand_augment <= 10:
            raise ValueError(f"rand_augment must be a magnitude from 0 to 10, got {self.rand_augment}; leave it out for none")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"erasing must be a share of the images in [0, 1], got {self.erasing}")

    @cached_property
    def steps(self) -> list[v2.Transform]:
        """The transforms, in their order."""
        found: list[v2.Transform] = []
        if self.rand_augment is not None:
            # Eleven magnitudes: 10 is the strongest of each operation, as on the original's scale. torchvision's default would be a third of it.
            found.append(v2.RandAugment(2, self.rand_augment, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR))
        if self.color:
            found.append(v2.ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.2))
        if self.erasing:
            found.append(v2.RandomErasing(self.erasing, value=MEAN_COLOR))
        return found

    def __call__(self, image: Any) -> Any:
        """Distort one image, an RGB Pillow image or uint8 (3, H, W), with draws from torch's global generator."""
        for step in self.steps:
            image = step(image)
        return image


@dataclass(frozen=True)
class Mixing:
    """Every training batch is mixed with itself, pixels and labels alike: mixup (Zhang et al., ICLR 2018) or CutMix (Yun et al., ICCV 2019).

    An image's partner is the one before it in the batch. Draws come from torch's global generator, which the task seeds for each step.

    Args:
        mixup: alpha of the Beta distribution of an image's share, 0.8 for DeiT; 0 for CutMix alone.
        cutmix: alpha of the Beta distribution of the area that an image keeps, 1 for DeiT; 0 for mixup alone.
        switch: share of the batches that get CutMix where both are wanted.

    Raises:
        ValueError: for a value out of range.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if min(self.mixup, self.cutmix) < 0 or max(self.mixup, self.cutmix) == 0 or not 0 <= self.switch <= 1:
            raise ValueError(
                f"mixup and cutmix must be at least 0 and one of them positive, switch in [0, 1], got {self.mixup}, {self.cutmix} and {self.switch}"
            )

    def __call__(self, images: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] and the share of each class in them, (B, K), of images and labels (B,)."""
        share = self.switch if self.mixup and self.cutmix else float(self.cutmix > 0)
        if torch.rand(()) < share:
            mixed, shares = v2.CutMix(alpha=self.cutmix, num_classes=num_classes)(images, labels)
        else:
            mixed, shares = v2.MixUp(alpha=self.mixup, num_classes=num_classes)(images, labels)
        return mixed.clamp(0, 1), shares
