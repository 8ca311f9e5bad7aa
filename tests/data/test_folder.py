"""Folders of images: layouts, pixels, and files that must not be scored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from gatewatt.data import Batch, FolderData, read_image

Folders = Callable[..., Path]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """Make ``root/<split>/<class>/<index>.png`` with random pixels."""

    def make(splits: dict[str, int], classes: tuple[str, ...] = ("ant", "bee"), size: tuple[int, int] = (32, 32)) -> Path:
        root, random = tmp_path / "insects", np.random.default_rng(0)
        for split, count in splits.items():
            for index in range(count):
                path = root / split / classes[index % len(classes)] / f"{index:03}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
        return root

    return make


def test_batches_hold_the_pixels_of_the_files(folders: Folders) -> None:
    root = folders({"train": 4, "test": 7})
    data = FolderData(str(root), eval_batch_size=3, val_images=2)
    assert (data.num_classes, data.name, data.size) == (2, "insects", 32)
    files = sorted((root / "test").rglob("*.png"))
    batches = list(data.test_dataloader())
    assert [len(batch.ids) for batch in batches] == [3, 3, 1]
    for batch in batches:
        assert isinstance(batch, Batch)
        for image, label, index in zip(*batch, strict=True):
            assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), np.asarray(Image.open(files[index])))
            assert int(label) == ["ant", "bee"].index(files[index].parent.name)


@pytest.mark.parametrize("size", [(48, 64), (80, 50), (64, 64), (20, 31), (33, 97)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_other_sizes_are_resized_and_cropped_as_torchvision_does(size: tuple[int, int], in_memory: bool, folders: Folders) -> None:
    root = folders({"test": 3}, size=size)
    shorter = 32 if in_memory else 32 * 256 // 224
    reference = v2.Compose([v2.Resize(shorter), v2.CenterCrop(32), v2.PILToTensor()])
    files = sorted((root / "test").rglob("*.png"))
    for batch in FolderData(str(root), in_memory=in_memory).test_dataloader():
        for image, index in zip(batch.images, batch.ids, strict=True):
            assert torch.equal((image * 255).round().byte(), reference(Image.open(files[index])))


@pytest.mark.parametrize("workers", [0, 1])
def test_decoding_on_the_fly_is_a_function_of_seed_and_epoch(workers: int, folders: Folders) -> None:
    root = folders({"train": 9, "test": 3}, size=(40, 36))

    def epoch(number: int, workers: int = 0, seed: int = 0) -> list[Batch]:
        data = FolderData(str(root), in_memory=False, batch_size=2, val_images=3, workers=workers, seed=seed)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        torch.rand(3)
        return list(loader)

    state = torch.get_rng_state()
    first = epoch(1)
    torch.set_rng_state(state)
    torch.rand(3)
    expected_state = torch.get_rng_state()
    torch.set_rng_state(state)
    again = epoch(1, workers)
    assert torch.equal(torch.get_rng_state(), expected_state)
    assert len(first) == 3
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.images, b.images)
        assert a.images.shape == (2, 3, 32, 32)
        assert a.images.min() >= 0
        assert a.images.max() <= 1
    assert not torch.equal(first[0].images, epoch(2)[0].images)
    assert not torch.equal(first[0].images, epoch(1, seed=1)[0].images)


def test_validation_comes_from_its_folder_or_is_split_off(folders: Folders) -> None:
    root = folders({"train": 10, "test": 2})
    split = FolderData(str(root), val_images=4)
    split.setup("fit")
    assert torch.bincount(split.split("val").labels).tolist() == [2, 2]
    assert len(split.split("train")) == 6
    folders({"val": 3})
    own = FolderData(str(root), val_images=4)
    own.setup("fit")
    assert (len(own.split("val")), len(own.split("train"))) == (3, 10)


def test_validation_alone_reads_no_training_images(folders: Folders) -> None:
    root = folders({"train": 2, "val": 3})
    next((root / "train").rglob("*.png")).write_text("not an image")
    data = FolderData(str(root))
    data.setup("validate")
    validation = data.split("val")
    assert len(validation) == 3
    with pytest.raises(ValueError, match="cannot be read"):
        data.setup("fit")
    assert data.split("val") is validation


def test_a_set_with_validation_images_only_is_tested_on_them(folders: Folders) -> None:
    data = FolderData(str(folders({"val": 5})), test="val")
    assert data.num_classes == 2
    assert sum(len(batch.ids) for batch in data.test_dataloader()) == 5


def test_a_missing_folder_is_named_when_it_is_asked_for(folders: Folders) -> None:
    data = FolderData(str(folders({"train": 10})), val_images=2)
    data.setup("fit")
    with pytest.raises(FileNotFoundError, match=r"no folder .*insects/test with the test images; set root, or test to the name of the folder"):
        data.setup("test")
    with pytest.raises(FileNotFoundError, match=r"none of the folders train, val, test in nowhere; set root"):
        FolderData("nowhere").num_classes  # noqa: B018
    (data.root / "test" / "ant").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no images in"):
        data.setup("test")


def test_labels_follow_the_training_classes_or_a_list(folders: Folders, tmp_path: Path) -> None:
    root = folders({"train": 6}, classes=("ant", "bee", "cat"))
    folders({"test": 4}, classes=("bee", "cat"))
    data = FolderData(str(root))
    assert data.num_classes == 3
    data.setup("test")
    assert data.split("test").labels.unique().tolist() == [1, 2]

    names = tmp_path / "classes.txt"
    names.write_text("dog\ncat\nbee\nant\n")
    listed = FolderData(str(root), classes=str(names))
    listed.setup("test")
    assert listed.num_classes == 4
    assert listed.split("test").labels.unique().tolist() == [1, 2]

    names.write_text("dog\ncat\n")
    with pytest.raises(ValueError, match="no known class, such as 'bee'; list them in classes"):
        FolderData(str(root), classes=str(names)).setup("test")


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unreadable_image_is_named(in_memory: bool, folders: Folders) -> None:
    root = folders({"test": 3})
    whole = (root / "test" / "ant" / "000.png").read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        (root / "test" / "ant" / "000.png").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"000\.png: cannot be read as an image"):
            list(FolderData(str(root), in_memory=in_memory).test_dataloader())


def png_of_16_bits(path: Path, channels: int) -> None:
    """A 4x4 PNG by hand: Pillow writes no colour image of 16 bits."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 4, 4, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = (b"\0" + struct.pack(">H", 32768) * 4 * channels) * 4
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_more_than_8_bits_per_channel_are_refused(channels: int, tmp_path: Path) -> None:
    png_of_16_bits(tmp_path / "deep.png", channels)
    with pytest.raises(ValueError, match=r"deep\.png: holds more than 8 bits per channel"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("P", "png"), ("1", "png"), ("RGBA", "png"), ("LA", "png"), ("CMYK", "jpg"), ("L", "jpg")]
)
def test_images_of_8_bits_become_rgb(mode: str, suffix: str, tmp_path: Path) -> None:
    pixels = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)).convert(mode)
    pixels.save(tmp_path / f"image.{suffix}")
    image = read_image(tmp_path / f"image.{suffix}")
    assert (image.mode, image.size) == ("RGB", (6, 5))


def test_a_folder_of_integers_and_floats_is_refused(tmp_path: Path) -> None:
    for mode in ("I", "F"):
        Image.new(mode, (4, 4)).save(tmp_path / "deep.tiff")
        with pytest.raises(ValueError, match="more than 8 bits"):
            read_image(tmp_path / "deep.tiff")
