"""Any data set laid out as ``root/{train,val,test}/<class>/*``: in memory when small, decoded batch by batch when large."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from gatewatt.data.batch import Batch, BatchKey, Images
from gatewatt.data.memory import Augmentation, MemoryImages
from gatewatt.data.module import ImageData, Split
from gatewatt.data.order import generator

DECODERS = 2  # threads that decode a set into memory; Pillow releases the interpreter lock while decoding


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file to 8-bit RGB.

    Raises:
        ValueError: naming the file, if it cannot be read, or holds more than 8 bits per channel: converting those would clip, not scale.
    """
    try:
        with Image.open(path) as image:
            deep = image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
            decoded = None if deep else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error}); repair or remove the file") from error
    if decoded is None:
        raise ValueError(f"{path}: holds more than 8 bits per channel, which would be clipped; convert it to 8 bits first")
    return decoded


def resized(image: Image.Image, size: int, shorter: int) -> Image.Image:
    """Resize the shorter side to ``shorter`` (bilinear) unless it is so already, then crop the centre to ``size`` x ``size``."""
    width, height = image.size
    if min(width, height) != shorter:
        # Truncated, and centred with round() below, as torchvision does: the same crop to the pixel.
        width, height = shorter * width // min(image.size), shorter * height // min(image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image if (width, height) == (size, size) else image.crop((left, top, left + size, top + size))


def pixels(image: Image.Image) -> Tensor:
    """uint8 (3, H, W) of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def decode(paths: list[str], size: int) -> Tensor:
    """Decode image files to uint8 (N, 3, size, size), shorter side resized and centre cropped where the size differs."""
    images = np.empty((len(paths), size, size, 3), dtype=np.uint8)

    def fill(chunk: range) -> None:
        for index in chunk:
            images[index] = np.asarray(resized(read_image(paths[index]), size, size))

    with ThreadPoolExecutor(DECODERS) as pool:
        list(pool.map(fill, [range(start, min(start + 512, len(paths))) for start in range(0, len(paths), 512)]))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class FileImages(Images):
    """A split on disk; indexed with a whole batch's key, whose images are then decoded.

    Args:
        paths: the N files.
        labels: int64 (N,).
        size: side of the images in pixels.
        augmentation: image to image (size, size), drawing from torch's generator; None in evaluation: shorter side to size * 256 // 224, then
            the centre.
    """

    paths: list[str]
    labels: Tensor
    size: int
    augmentation: Callable[[Image.Image], Image.Image] | None = None

    def at(self, indices: Tensor) -> FileImages:
        """The images at these positions as a split of its own."""
        return FileImages([self.paths[index] for index in indices.tolist()], self.labels[indices], self.size, self.augmentation)

    def augmented(self, augmentation: Callable[[Image.Image], Image.Image] | None) -> FileImages:
        """The same images with this augmentation."""
        return replace(self, augmentation=augmentation)

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of ``key``."""
        images = [read_image(self.paths[index]) for index in key.indices.tolist()]
        if self.augmentation is None:
            images = [resized(image, self.size, self.size * 256 // 224) for image in images]
        else:
            # torchvision draws from the global generator: lend it a seeded one, and put the old state back.
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(generator(key.seed, "augmentation", key.epoch, key.number).get_state())
                images = [self.augmentation(image) for image in images]
        return Batch(torch.stack([pixels(image) for image in images]).float().div_(255), self.labels[key.indices], key.indices)


class FolderData(ImageData):
    """Images in folders, one folder per class: ``root/<split>/<class>/<image>``.

    Args:
        root: the folder of the splits.
        name: what the data set is called in results; default: the name of ``root``.
        train: folder of the training images; may be missing if nothing is trained.
        val: folder of the validation images; if missing, ``val_images`` are split off the training images.
        test: folder of the test images; ``test="val"`` tests on the validation folder, as is usual for ImageNet.
        classes: text file with one class folder name per line, in the order of the labels; default: the folders found, sorted, in ``train`` or
            else in the first of ``val`` and ``test`` that exists. Needed where only some classes of a network's training set are at hand.
        size: side of the images in pixels; see ``in_memory``.
        batch_size: images per training batch and process.
        eval_batch_size: images per batch in validation, test and prediction.
        in_memory: decode each split once to uint8, shorter side to ``size`` and centre cropped where it differs; train with padded random crops
            and flips. If false, decode batch by batch: random resized crop and flip in training, shorter side to size * 256 // 224 and centre
            crop in evaluation.
        workers: loader processes; worth it with ``in_memory=False``.
        crop_padding: padding of the random crop in memory.
        flip: flip half of the training images.
        val_images: images split off the training images where there is no ``val`` folder.
        val_subset: see :class:`~gatewatt.data.module.ImageData`.
        test_images: see :class:`~gatewatt.data.module.ImageData`.
        seed: seed of training order and augmentation.
        split_seed: seed of validation split and subsets.

    Raises:
        ValueError: on an argument out of range or an image that cannot be read, naming it.
        FileNotFoundError: when a split is asked for whose folder is missing.
    """

    def __init__(
        self,
        root: str,
        *,
        name: str | None = None,
        train: str = "train",
        val: str = "val",
        test: str = "test",
        classes: str | None = None,
        size: int = 32,
        batch_size: int = 128,
        eval_batch_size: int = 250,
        in_memory: bool = True,
        workers: int = 0,
        crop_padding: int = 4,
        flip: bool = True,
        val_images: int = 5000,
        val_subset: int | None = None,
        test_images: int | None = None,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            name=name or Path(root).resolve().name,
            size=size,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            workers=workers,
            seed=seed,
            split_seed=split_seed,
            val_images=val_images,
            val_subset=val_subset,
            test_images=test_images,
        )
        self.root = Path(root)
        self.folders: dict[Split, str] = {"train": train, "val": val, "test": test}
        self.class_file = classes
        self.in_memory = in_memory
        if in_memory:
            self.augmentation = Augmentation(crop_padding, flip)
        else:
            flips = [v2.RandomHorizontalFlip()] if flip else []
            self.augmentation = v2.Compose([v2.RandomResizedCrop(size, antialias=True), *flips])

    @cached_property
    def classes(self) -> list[str]:
        """Folder name of each class, in the order of the labels."""
        if self.class_file is not None:
            if not Path(self.class_file).is_file():
                raise FileNotFoundError(f"no file {self.class_file}; classes names a text file with one class folder per line")
            return Path(self.class_file).read_text(encoding="utf-8").split()
        for folder in (self.root / name for name in self.folders.values()):
            if folder.is_dir():
                found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
                if not found:
                    raise FileNotFoundError(f"no class folders in {folder}; expected {folder}/<class>/<image>")
                return found
        raise FileNotFoundError(f"none of the folders {', '.join(self.folders.values())} in {self.root}; set root to the folder that holds them")

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def source(self, split: Split) -> Images | None:
        """All images of the split's folder; None if there is no folder ``val``."""
        folder = self.root / self.folders[split]
        if not folder.is_dir():
            if split == "val":
                return None
            raise FileNotFoundError(f"no folder {folder} with the {split} images; set root, or {split} to the name of the folder inside root")
        unknown = sorted({entry.name for entry in folder.iterdir() if entry.is_dir()} - set(self.classes))
        if unknown:
            raise ValueError(f"{folder} holds {len(unknown)} folders that are no known class, such as {unknown[0]!r}; list them in classes")
        samples = make_dataset(folder, {name: label for label, name in enumerate(self.classes)}, IMG_EXTENSIONS, allow_empty=True)
        if not samples:
            raise FileNotFoundError(f"no images in {folder}; expected {folder}/<class>/<image> with one of {', '.join(IMG_EXTENSIONS)}")
        paths, labels = [path for path, _ in samples], torch.tensor([label for _, label in samples])
        return MemoryImages(decode(paths, self.size), labels) if self.in_memory else FileImages(paths, labels, self.size)
