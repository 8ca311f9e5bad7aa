"""Caltech-UCSD Birds 200-2011 in its own layout: tables of images, labels and splits beside the folder of images (Wah et al., 2011)."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from gatewatt.data.batch import Images
from gatewatt.data.distortion import Distortion
from gatewatt.data.folder import FileImages, decode, streamed
from gatewatt.data.memory import Augmentation, MemoryImages
from gatewatt.data.module import ImageData, Split

TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def read_table(path: Path) -> dict[int, str]:
    """``id value`` per line -> {id: value}.

    Raises:
        ValueError: naming the file and line that is not such a pair, or repeats an id.
    """
    rows: dict[int, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        identifier, _, value = line.strip().partition(" ")
        if not identifier.isdigit() or not value:
            raise ValueError(f"{path}, line {number}: expected a number and a value, got {line!r}")
        if int(identifier) in rows:
            raise ValueError(f"{path}, line {number}: id {identifier} appears twice")
        rows[int(identifier)] = value
    return rows


class CubData(ImageData):
    """CUB-200-2011: 5,994 training and 5,794 test images of 200 bird species.

    Args:
        root: the unpacked folder ``CUB_200_2011``, which holds ``images.txt``, ``image_class_labels.txt``, ``train_test_split.txt``,
            ``classes.txt`` and ``images/``. Nothing is downloaded.
        size: side of the images in pixels.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch in validation, test and prediction.
        in_memory: as in :class:`~gatewatt.data.folder.FolderData`.
        workers: loader processes; worth it with ``in_memory=False``.
        crop_padding: padding of the random crop in memory.
        flip: flip half of the training images.
        distortion: further augmentation of the training images.
        val_images: images split off the training images for validation, stratified by class.
        val_subset: see :class:`~gatewatt.data.module.ImageData`.
        test_images: see :class:`~gatewatt.data.module.ImageData`.
        test_offset: see :class:`~gatewatt.data.module.ImageData`.
        seed: seed of training order and augmentation.
        split_seed: seed of validation split and subsets.

    Raises:
        FileNotFoundError: when a table or an image that a table names is missing, naming it.
        ValueError: when a table is malformed or the tables do not belong together.
    """

    def __init__(
        self,
        root: str,
        *,
        size: int = 224,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        in_memory: bool = False,
        workers: int = 0,
        crop_padding: int = 4,
        flip: bool = True,
        distortion: Distortion | None = None,
        val_images: int = 600,
        val_subset: int | None = None,
        test_images: int | None = None,
        test_offset: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            name="cub200",
            size=size,
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
        self.root, self.in_memory = Path(root), in_memory
        if in_memory:
            self.augmentation = Augmentation(crop_padding, flip, distortion)
        else:
            self.augmentation = streamed(size, flip, distortion)

    @cached_property
    def tables(self) -> dict[str, dict[int, str]]:
        """The four tables by file name, checked to belong together."""
        missing = [name for name in TABLES if not (self.root / name).is_file()]
        if missing:
            raise FileNotFoundError(f"no {missing[0]} in {self.root}; set root to the unpacked folder CUB_200_2011")
        tables = {name: read_table(self.root / name) for name in TABLES}
        images, labels, splits, classes = tables.values()
        for name, table in (("image_class_labels.txt", labels), ("train_test_split.txt", splits)):
            odd = sorted(images.keys() ^ table.keys())
            if odd:
                raise ValueError(f"{self.root / name}: image id {odd[0]} is in this file or in images.txt, but not in both")
        if sorted(classes) != list(range(1, len(classes) + 1)):
            raise ValueError(f"{self.root / 'classes.txt'}: class ids must be 1 to {len(classes)}")
        wrong = next((identifier for identifier, label in labels.items() if not label.isdigit() or int(label) not in classes), None)
        if wrong is not None:
            raise ValueError(f"{self.root / 'image_class_labels.txt'}: image {wrong} has class {labels[wrong]!r}, which classes.txt does not list")
        wrong = next((identifier for identifier, value in splits.items() if value not in ("0", "1")), None)
        if wrong is not None:
            raise ValueError(f"{self.root / 'train_test_split.txt'}: image {wrong} has {splits[wrong]!r}; expected 1 (training) or 0 (test)")
        return tables

    @property
    def classes(self) -> list[str]:
        """Name of each class, in the order of the labels."""
        classes = self.tables["classes.txt"]
        return [classes[identifier] for identifier in sorted(classes)]

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def source(self, split: Split) -> Images | None:
        """All images of the split, in the order of ``images.txt``; validation images are split off the training images."""
        if split == "val":
            return None
        images, labels, splits, _ = self.tables.values()
        chosen = [identifier for identifier in images if splits[identifier] == ("1" if split == "train" else "0")]
        if not chosen:
            raise ValueError(f"{self.root / 'train_test_split.txt'} names no {split} images")
        paths = [str(self.root / "images" / images[identifier]) for identifier in chosen]
        absent = [path for path in paths if not Path(path).is_file()]
        if absent:
            raise FileNotFoundError(f"{len(absent)} images of {self.root / 'images.txt'} are missing, the first is {absent[0]}")
        targets = torch.tensor([int(labels[identifier]) - 1 for identifier in chosen])
        return MemoryImages(decode(paths, self.size), targets) if self.in_memory else FileImages(paths, targets, self.size)
