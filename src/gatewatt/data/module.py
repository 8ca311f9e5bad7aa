"""The LightningDataModule that all data sets share: splits, subsets, orders and loaders. A data set only says where its images come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule

from gatewatt.data.batch import Images
from gatewatt.data.loader import BatchLoader
from gatewatt.data.order import BatchOrder, generator
from gatewatt.data.splits import stratified, subset

Split = Literal["train", "val", "test"]


class ImageData(LightningDataModule, ABC):
    """Train, validation and test loaders over one image data set; every batch is a :class:`~gatewatt.data.batch.Batch`.

    Args:
        name: what the data set is called in results and checkpoints.
        size: side of the images in pixels.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch in validation, test and prediction.
        workers: loader processes; 0 loads in the main process. Changes no batch.
        seed: seed of the training order and of the augmentation. Splits and subsets do not depend on it: a network is never tested on images
            that it was trained on because a seed changed.
        split_seed: seed of the validation split and of the subsets.
        val_images: images split off the training set for validation, stratified by class, where the data set has no validation set of its own;
            0 trains on everything and validates on nothing.
        val_subset: validate on the first so many images of a seeded permutation; None for all.
        test_images: test and predict on the first so many images of a seeded permutation; None for all. A smaller subset is the beginning of a
            larger one.
        test_offset: leave so many images of that permutation out before the first. Two runs of ``test_images=n``, one with ``test_offset=n``, are
            of images that have none in common: settings can be chosen on the one and reported on the other.

    Raises:
        ValueError: on a count out of range, naming the argument.
    """

    name: str
    augmentation: object

    def __init__(
        self,
        *,
        name: str,
        size: int,
        batch_size: int,
        eval_batch_size: int,
        workers: int,
        seed: int,
        split_seed: int,
        val_images: int,
        val_subset: int | None,
        test_images: int | None,
        test_offset: int = 0,
    ) -> None:
        super().__init__()
        counts = {"size": size, "batch_size": batch_size, "eval_batch_size": eval_batch_size, "val_subset": val_subset, "test_images": test_images}
        for argument, value in counts.items():
            if value is not None and value < 1:
                whole = "; leave it out for the whole set" if argument in ("val_subset", "test_images") else ""
                raise ValueError(f"{argument} must be at least 1, got {value}{whole}")
        for argument, value in {"workers": workers, "val_images": val_images, "test_offset": test_offset}.items():
            if value < 0:
                raise ValueError(f"{argument} must be at least 0, got {value}")
        self.name = name
        self.size = size
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self.seed = seed
        self.split_seed = split_seed
        self.val_images = val_images
        self.val_subset = val_subset
        self.test_images = test_images
        self.test_offset = test_offset
        self._splits: dict[Split, Images] = {}

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes."""

    @abstractmethod
    def source(self, split: Split) -> Images | None:
        """All images that the data set holds for ``split``, without augmentation; None for ``val`` if it is to be split off ``train``."""

    def setup(self, stage: str | None = None) -> None:
        """Load what the stage needs: ``fit``, ``validate``, ``test``, ``predict``, or None for everything."""
        wanted: dict[str | None, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        for split in wanted.get(stage, ("train", "val", "test")):
            self.split(split)

    def split(self, split: Split) -> Images:
        """The images of a split, loaded once."""
        if split not in self._splits:
            images = None if split == "train" else self.source(split)
            if images is None:
                self._load_training()
            else:
                self._splits[split] = images
        return self._splits[split]

    def _load_training(self) -> None:
        """Fill in ``train``, and ``val`` if it is not there yet: from its own images, or split off the training images."""
        training = self.source("train")
        if training is None:
            raise ValueError(f"{self.name} has no training images; it can only be tested on")
        validation = self._splits["val"] if "val" in self._splits else self.source("val")
        if validation is None:
            if self.val_images >= len(training):
                raise ValueError(f"val_images {self.val_images} leaves nothing of the {len(training)} training images; choose fewer")
            kept, taken = stratified(training.labels, self.val_images, self.split_seed)
            training, validation = training.at(kept), training.at(taken)
        self._splits["train"], self._splits["val"] = training.augmented(self.augmentation), validation

    def _loader(self, images: Images, order: BatchOrder) -> BatchLoader:
        # Without a generator of its own a loader draws from the global one.
        return BatchLoader(
            images,
            sampler=order,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            generator=generator(self.seed, "workers"),
        )

    def _evaluation(self, split: Split, count: int | None, offset: int = 0) -> BatchLoader:
        images = self.split(split)
        return self._loader(images, BatchOrder(subset(len(images), count, self.split_seed, offset), self.eval_batch_size))

    def _trained(self, order: BatchOrder) -> int:
        """Batches of the current epoch that the trainer has already trained on: more than 0 in a resumed run only."""
        trainer = self.trainer
        # A callback may iterate over a second training loader in the middle of an epoch: that one begins at the beginning.
        if trainer is None or not trainer.training or getattr(trainer.train_dataloader, "sampler", None) is not order:
            return 0
        return trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def train_dataloader(self) -> BatchLoader:
        """Shuffled and augmented batches of ``batch_size``; the last incomplete one is dropped."""
        images = self.split("train")
        order = BatchOrder(torch.arange(len(images)), self.batch_size, seed=self.seed, shuffle=True)
        order.start = lambda: self._trained(order)
        return self._loader(images, order)

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """The validation images or their subset; no loader if there are none."""
        return self._evaluation("val", self.val_subset) if len(self.split("val")) else []

    def test_dataloader(self) -> BatchLoader:
        """The test images or their subset."""
        return self._evaluation("test", self.test_images, self.test_offset)

    def predict_dataloader(self) -> BatchLoader:
        """The same as for the test."""
        return self.test_dataloader()
