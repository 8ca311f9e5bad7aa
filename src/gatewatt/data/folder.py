"""Any data set laid out as ``root/{train,val,test}/<class>/*``: in memory when small, decoded batch by batch when large."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import v2

from gatewatt.data.batch import Batch, BatchKey, Images
from gatewatt.data.distortion import Distortion
from gatewatt.data.memory import Augmentation, MemoryImages
from gatewatt.data.module import ImageData, Split
from gatewatt.data.order import generator, lent

DECODERS = 2  # threads that decode a set into memory; Pillow releases the interpreter lock while decoding
READERS = 8  # threads that look at files without decoding them: they wait for the disk
MAX_PIXELS = 89_478_485  # where Pillow begins to warn of a bomb; it refuses at twice as many
PLAIN_MODES = ("1", "L", "P", "RGB", "RGBX")  # become RGB without a question
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")

OnBad = Literal["error", "skip", "convert"]


class Fault(NamedTuple):
    """Why an image should not be scored as it is.

    Attributes:
        path: the file.
        reason: in a few words.
        remedy: what to do about it.
        convertible: whether Pillow turns it into RGB all the same, by dropping what RGB cannot say.
    """

    path: str
    reason: str
    remedy: str
    convertible: bool = False

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


def opened(path: str | Path) -> Image.Image:
    """Open an image file and look at its header.

    Raises:
        ValueError: naming the file, if it is no image, a bomb, or holds more than 8 bits per channel: converting those would clip, not scale.
    """
    try:
        image = Image.open(path)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(unreadable(path, error)) from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(unreadable(path, f"its {image.width} x {image.height} pixels would fill the memory"))
    if image.mode.startswith(("I", "F")) or any(";16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        image.close()
        raise ValueError(f"{path}: holds more than 8 bits per channel, which would be clipped; convert it to 8 bits first")
    return image


def unreadable(path: str | Path, reason: object) -> str:
    """What is said of a file that cannot be read."""
    return f"{path}: cannot be read as an image ({reason}); repair or remove the file"


def read_image(path: str | Path) -> Image.Image:
    """Decode an image file to 8-bit RGB, as Pillow converts it: transparency is dropped, CMYK inverted without a profile.

    Raises:
        ValueError: naming the file, if it cannot be read, or holds more than 8 bits per channel: converting those would clip, not scale.
    """
    with opened(path) as image:
        try:
            return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ValueError(unreadable(path, error)) from error


def examine(path: str, *, whole: bool) -> Fault | None:
    """What is wrong with an image file, or None.

    Args:
        path: the file.
        whole: decode it; otherwise look at header, checksums and ending only, which finds cut-off files and costs little.
    """
    try:
        with opened(path) as image:
            kind, mode = image.format, image.mode
            transparent = mode in ALPHA_MODES or "transparency" in image.info
            if whole or transparent or kind not in ("JPEG", "PNG"):
                image.load()
                transparent = transparent and image.convert("RGBA").getchannel("A").getextrema()[0] < 255
            elif kind == "PNG":
                image.verify()
        if not ends(path, kind):
            return Fault(path, "cannot be read as an image (it is cut off)", "repair or remove the file")
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        reason, _, remedy = str(error).removeprefix(f"{path}: ").partition("; ")
        known = isinstance(error, ValueError) and remedy
        return Fault(path, reason, remedy) if known else Fault(path, f"cannot be read as an image ({error})", "repair or remove the file")
    if transparent:
        return Fault(path, "has transparent pixels, whose colours are arbitrary", "flatten it onto a background, or set on_bad", convertible=True)
    if mode not in (*PLAIN_MODES, *ALPHA_MODES):
        return Fault(path, f"is {mode}, whose colours depend on a profile", "convert it to RGB, or set on_bad", convertible=True)
    return None


def ends(path: str, kind: str | None) -> bool:
    """Whether a JPEG or PNG file has its end, which Pillow decodes without; cameras and editors append a little of their own after it."""
    mark = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}.get(kind or "")
    if mark is None:
        return True
    with Path(path).open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(0, stream.tell() - 65_536))
        return mark in stream.read()


def survey(paths: Sequence[str]) -> list[Fault]:
    """The faults of image files that are decoded later, found without decoding them."""
    with ThreadPoolExecutor(READERS) as pool:
        return [fault for fault in pool.map(partial(examine, whole=False), paths) if fault is not None]


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
    """Decode image files to uint8 (N, 3, size, size), shorter side resized and centre cropped where the size differs.

    Raises:
        ValueError: naming the first file that cannot be read.
    """
    images, faults = decode_sound(paths, size)
    broken = [fault for fault in faults if not fault.convertible]
    if broken:
        raise ValueError(str(broken[0]))
    return images


def decode_sound(paths: Sequence[str], size: int) -> tuple[Tensor, list[Fault]]:
    """Decode image files as :func:`decode` does, and say which of them have faults.

    Returns:
        uint8 (N, 3, size, size), black where a file cannot be read, and the faults in the order of the files.
    """
    images = np.zeros((len(paths), size, size, 3), dtype=np.uint8)
    faults: dict[int, Fault] = {}

    def fill(chunk: range) -> None:
        for index in chunk:
            fault = None
            try:
                with opened(paths[index]) as image:
                    questionable = image.mode not in PLAIN_MODES or "transparency" in image.info or not ends(paths[index], image.format)
            except ValueError:
                questionable = True
            if questionable:
                fault = examine(paths[index], whole=True)
            if fault is None or fault.convertible:
                try:
                    images[index] = np.asarray(resized(read_image(paths[index]), size, size))
                except ValueError as error:
                    reason, _, remedy = str(error).removeprefix(f"{paths[index]}: ").partition("; ")
                    fault = Fault(paths[index], reason, remedy)
            if fault is not None:
                faults[index] = fault

    with ThreadPoolExecutor(DECODERS) as pool:
        list(pool.map(fill, [range(start, min(start + 512, len(paths))) for start in range(0, len(paths), 512)]))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), [faults[index] for index in sorted(faults)]


def settle(faults: Sequence[Fault], images: int, what: str, on_bad: OnBad) -> list[Fault]:
    """Decide what becomes of images with faults, and say so in one line.

    Args:
        faults: what was found.
        images: how many images there are.
        what: what they are, for the message.
        on_bad: ``error`` refuses them, ``skip`` leaves them out, ``convert`` lets Pillow convert those it can and refuses the rest.

    Returns:
        The faults whose images are to be left out.

    Raises:
        ValueError: naming the first image that is refused, and how many there are.
    """
    refused = [fault for fault in faults if on_bad == "error" or (on_bad == "convert" and not fault.convertible)]
    if refused:
        more = f" (and {len(refused) - 1} more of {images} images)" if len(refused) > 1 else ""
        skip = ", or set on_bad: skip" if "on_bad" not in refused[0].remedy else " to skip or convert"
        raise ValueError(f"{refused[0]}{skip}{more}")
    if faults and on_bad == "skip" and len(faults) == images:
        raise ValueError(f"{faults[0]}: none of the {images} {what} is left")
    if faults:
        done = {"skip": "left out", "convert": "converted with a loss"}[on_bad]
        reasons = ", ".join(f"{count} {reason.split(',')[0].split(' (')[0]}" for reason, count in Counter(fault.reason for fault in faults).items())
        named = ", ".join(Path(fault.path).name for fault in faults[:5]) + (" ..." if len(faults) > 5 else "")
        notice(f"gatewatt: {len(faults)} of {images} {what} {done} ({reasons}): {named}")
    return list(faults) if on_bad == "skip" else []


@rank_zero_only
def notice(line: str) -> None:
    """One line for the user, once on several processes."""
    print(line, file=sys.stderr)


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
            with lent(generator(key.seed, "augmentation", key.epoch, key.number)):
                images = [self.augmentation(image) for image in images]
        return Batch(torch.stack([pixels(image) for image in images]).float().div_(255), self.labels[key.indices], key.indices)


def streamed(size: int, flip: bool, distortion: Distortion | None) -> v2.Compose:
    """Augmentation of images that are decoded batch by batch: random resized crop, flip, and what is wanted beyond."""
    flips = [v2.RandomHorizontalFlip()] if flip else []
    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), *flips, *([] if distortion is None else [distortion])])


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
        distortion: further augmentation of the training images.
        val_images: images split off the training images where there is no ``val`` folder.
        val_subset: see :class:`~gatewatt.data.module.ImageData`.
        test_images: see :class:`~gatewatt.data.module.ImageData`.
        test_offset: see :class:`~gatewatt.data.module.ImageData`.
        seed: seed of training order and augmentation.
        split_seed: seed of validation split and subsets.
        on_bad: every file of a split is looked at before anything is computed. ``error`` refuses files that are cut off, no images, bombs, of
            more than 8 bits per channel, transparent or CMYK, by name; ``skip`` leaves them out and says which; ``convert`` takes transparent
            and CMYK images as Pillow converts them, as is usual for ImageNet, and refuses the rest.

    Attributes:
        left_out: split -> the files that were left out.

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
        distortion: Distortion | None = None,
        val_images: int = 5000,
        val_subset: int | None = None,
        test_images: int | None = None,
        test_offset: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        on_bad: OnBad = "error",
    ) -> None:
        if on_bad not in ("error", "skip", "convert"):
            raise ValueError(f"on_bad must be error, skip or convert, got {on_bad!r}")
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
            test_offset=test_offset,
        )
        self.root = Path(root)
        self.folders: dict[Split, str] = {"train": train, "val": val, "test": test}
        self.class_file = classes
        self.in_memory = in_memory
        self.on_bad = on_bad
        self.left_out: dict[Split, list[str]] = {}
        if in_memory:
            self.augmentation = Augmentation(crop_padding, flip, distortion)
        else:
            self.augmentation = streamed(size, flip, distortion)

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
        images: Images
        if self.in_memory:
            pixels_of_all, faults = decode_sound(paths, self.size)
            images = MemoryImages(pixels_of_all, labels)
        else:
            faults = survey(paths)
            images = FileImages(paths, labels, self.size)
        self.left_out[split] = [fault.path for fault in settle(faults, len(paths), f"{split} images", self.on_bad)]
        if self.left_out[split]:
            dropped = set(self.left_out[split])
            images = images.at(torch.tensor([index for index, path in enumerate(paths) if path not in dropped]))
        return images
