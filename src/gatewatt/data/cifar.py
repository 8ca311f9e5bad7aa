"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) over torchvision: 50,000 training and 10,000 test images of 32x32, kept in memory."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torchvision.datasets import CIFAR10, CIFAR100

from gatewatt.data.batch import Images
from gatewatt.data.distortion import Distortion
from gatewatt.data.memory import Augmentation, MemoryImages
from gatewatt.data.module import ImageData, Split


class CIFAR10Data(ImageData):
    """CIFAR-10: ten classes, in the files that torchvision downloads.

    Args:
        root: folder that holds the extracted folder of the data set.
        download: fetch the files into ``root`` if they are missing, about 170 MB.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch in validation, test and prediction.
        workers: loader processes; the images are in memory, so 0 is fast but for a ``distortion``.
        crop_padding: black pixels around a training image before its random crop.
        flip: flip half of the training images.
        distortion: further augmentation of the training images.
        val_images: images split off the training set for validation, stratified by class.
        val_subset: see :class:`~gatewatt.data.module.ImageData`.
        test_images: see :class:`~gatewatt.data.module.ImageData`.
        test_offset: see :class:`~gatewatt.data.module.ImageData`.
        seed: seed of training order and augmentation.
        split_seed: seed of validation split and subsets.

    Raises:
        ValueError: on an argument out of range, naming it.
        FileNotFoundError: if the files are missing.
    """

    dataset: ClassVar[type[CIFAR10]] = CIFAR10
    title: ClassVar[str] = "cifar10"
    classes: ClassVar[int] = 10

    def __init__(
        self,
        root: str = "data",
        *,
        download: bool = False,
        batch_size: int = 128,
        eval_batch_size: int = 250,
        workers: int = 0,
        crop_padding: int = 4,
        flip: bool = True,
        distortion: Distortion | None = None,
        val_images: int = 5000,
        val_subset: int | None = None,
        test_images: int | None = None,
        test_offset: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            name=self.title,
            size=32,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            workers=workers,
            seed=seed,
            split_seed=split_seed,
            val_images=val_images,
            val_subset=val_subset,
            test_images=test_images,
            test_offset=test_offset,
        )
        self.root = Path(root)
        self.download = download
        self.augmentation = Augmentation(crop_padding, flip, distortion)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.classes

    def prepare_data(self) -> None:
        """Download if asked to; Lightning calls this on one process."""
        if self.download:
            self.dataset(self.root, download=True)

    def source(self, split: Split) -> Images | None:
        """The training or the test images; there is no validation set."""
        if split == "val":
            return None
        try:
            files = self.dataset(self.root, train=split == "train")
        except RuntimeError as error:
            raise FileNotFoundError(
                f"no intact folder {self.dataset.base_folder} in {self.root}; set root to where it is, or download to true to fetch it once"
            ) from error
        return MemoryImages(torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets))


class CIFAR100Data(CIFAR10Data):
    """CIFAR-100: a hundred classes, otherwise as :class:`CIFAR10Data`."""

    dataset = CIFAR100
    title = "cifar100"
    classes = 100
