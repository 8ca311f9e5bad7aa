"""1,797 real handwritten digits that come with scikit-learn: a data set for a first run and for tests, without any download.

Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits" (UCI, 1998): 8x8 counts of 0..16 ink pixels, shown at 32x32. A smoke set: its
numbers say that things work, not how good they are.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from gatewatt.data.batch import Images
from gatewatt.data.memory import Augmentation, MemoryImages
from gatewatt.data.module import ImageData, Split
from gatewatt.data.splits import stratified

TEST_IMAGES = 400  # of the 1,797, stratified by class and the same whatever the arguments


class DigitsData(ImageData):
    """Digits 0 to 9 at 32x32, three equal channels: 1,197 training, 200 validation and 400 test images.

    Enlarged bilinearly. The training images are moved by a padded random crop and never flipped.

    Args:
        batch_size: images per training batch and process.
        eval_batch_size: images per batch in validation, test and prediction.
        crop_padding: black pixels around a training image before its random crop.
        val_images: images split off the training set for validation, stratified by class.
        val_subset: see :class:`~gatewatt.data.module.ImageData`.
        test_images: see :class:`~gatewatt.data.module.ImageData`.
        test_offset: see :class:`~gatewatt.data.module.ImageData`.
        seed: seed of training order and augmentation.
        split_seed: seed of validation split and subsets.

    Raises:
        ValueError: on an argument out of range, naming it.
    """

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 100,
        crop_padding: int = 2,
        val_images: int = 200,
        val_subset: int | None = None,
        test_images: int | None = None,
        test_offset: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            name="digits",
            size=32,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            workers=0,
            seed=seed,
            split_seed=split_seed,
            val_images=val_images,
            val_subset=val_subset,
            test_images=test_images,
            test_offset=test_offset,
        )
        self.augmentation = Augmentation(crop_padding, flip=False)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return 10

    def source(self, split: Split) -> Images | None:
        """The training or the test images; validation images are split off the training images."""
        if split == "val":
            return None
        # Here, because it takes most of a second and only this data set needs it.
        from sklearn.datasets import load_digits

        digits = load_digits()
        labels = torch.from_numpy(digits.target).long()
        ink = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
        images = functional.interpolate(ink, size=(self.size, self.size), mode="bilinear", align_corners=False).round().to(torch.uint8)
        training, test = stratified(labels, TEST_IMAGES, seed=0)
        return MemoryImages(images.expand(-1, 3, -1, -1).contiguous(), labels).at(test if split == "test" else training)
