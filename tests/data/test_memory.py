"""Augmentation, splits and the data sets that live in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gatewatt.data import Augmentation, Batch, CIFAR10Data, CIFAR100Data, DigitsData
from gatewatt.data.order import generator
from gatewatt.data.splits import stratified, subset


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("shape", [(9, 3, 8, 8), (5, 3, 6, 10)])
def test_whole_batch_augmentation_equals_a_loop_over_images(padding: int, flip: bool, shape: tuple[int, ...]) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    augmented = Augmentation(padding, flip)(images, generator(1))

    source, (count, _, height, width) = generator(1), shape
    rows, columns = torch.randint(0, 2 * padding + 1, (2, count), generator=source).numpy()
    flipped = torch.randint(0, 2, (count,), generator=source).tolist() if flip else [0] * count
    for index, image in enumerate(images.numpy()):
        padded = np.pad(image, ((0, 0), (padding, padding), (padding, padding)))
        expected = padded[:, rows[index] : rows[index] + height, columns[index] : columns[index] + width]
        expected = expected[:, :, ::-1] if flipped[index] else expected
        assert np.array_equal(augmented[index].numpy(), expected)


def test_every_offset_and_both_directions_occur() -> None:
    ramp = torch.arange(1, 17, dtype=torch.uint8).reshape(1, 1, 4, 4).expand(2000, 3, 4, 4)
    assert len(Augmentation(1, flip=True)(ramp, generator(0)).flatten(1).unique(dim=0)) == 3 * 3 * 2


def test_a_negative_padding_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_padding must be at least 0"):
        Augmentation(-1)


@pytest.mark.parametrize("count", [0, 1, 7, 50, 99, 100])
def test_a_stratified_split_keeps_the_share_of_each_class(count: int) -> None:
    labels = torch.tensor([0] * 10 + [1] * 30 + [2] * 60)[torch.randperm(100)]
    rest, part = stratified(labels, count, seed=0)
    assert torch.cat([rest, part]).sort().values.tolist() == list(range(100))
    assert len(part) == count
    shares = torch.bincount(labels[part], minlength=3)
    assert (shares - torch.tensor([0.1, 0.3, 0.6]) * count).abs().max() < 1
    again = stratified(labels, count, seed=0)
    assert torch.equal(part, again[1])


def test_a_split_depends_on_its_seed_and_cannot_take_more_than_there_is() -> None:
    labels = torch.arange(100) % 2
    assert not torch.equal(stratified(labels, 10, seed=0)[1], stratified(labels, 10, seed=1)[1])
    with pytest.raises(ValueError, match="cannot split 101 of 100"):
        stratified(labels, 101, seed=0)
    assert not torch.equal(subset(100, 10, seed=0), subset(100, 10, seed=1))


def test_digits_are_the_images_of_scikit_learn_at_32x32() -> None:
    from sklearn.datasets import load_digits

    data = DigitsData()
    data.setup()
    sizes = [len(data.split(split)) for split in ("train", "val", "test")]  # type: ignore[arg-type]
    assert sizes == [1197, 200, 400]
    assert (data.num_classes, data.name, data.size) == (10, "digits", 32)

    digits = load_digits()
    # Bilinear, centres aligned: output row r lies at (r + 0.5) / 4 - 0.5 of the input, clamped to it.
    at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    low = np.minimum(at.astype(int), 6)
    matrix = np.zeros((32, 8))
    matrix[np.arange(32), low] = 1 - (at - low)
    matrix[np.arange(32), low + 1] += at - low
    enlarged = (matrix @ digits.images @ matrix.T) * 255 / 16
    for batch in data.test_dataloader():
        assert isinstance(batch, Batch)
        assert batch.images.shape[1:] == (3, 32, 32)
        assert batch.images.dtype == torch.float32
        assert batch.labels.dtype == batch.ids.dtype == torch.int64
        assert 0 <= batch.images.min() < batch.images.max() <= 1
        for image, label in zip(batch.images.numpy() * 255, batch.labels, strict=True):
            nearest = np.abs(enlarged - image[0]).max(axis=(1, 2))
            assert nearest.min() < 0.51
            assert digits.target[nearest.argmin()] == label
            assert np.array_equal(image[0], image[1])
            assert np.array_equal(image[0], image[2])


def test_digits_splits_do_not_overlap_and_do_not_depend_on_the_training_seed() -> None:
    def fingerprints(seed: int) -> dict[str, set[bytes]]:
        data = DigitsData(seed=seed)
        return {split: {image.numpy().tobytes() for image in data.split(split).images} for split in ("train", "val", "test")}  # type: ignore

    first = fingerprints(0)
    assert first == fingerprints(3)
    assert not first["train"] & first["test"]
    assert not first["train"] & first["val"]
    assert not first["val"] & first["test"]


def test_digits_are_never_flipped() -> None:
    data = DigitsData(crop_padding=0)
    batch = next(iter(data.train_dataloader()))
    images = data.split("train").images  # type: ignore[attr-defined]
    assert torch.equal(batch.images, images[batch.ids].float() / 255)


@pytest.mark.parametrize(
    ("argument", "value", "remedy"),
    [
        ("batch_size", 0, "must be at least 1, got 0"),
        ("eval_batch_size", -1, "must be at least 1, got -1"),
        ("val_images", -1, "must be at least 0, got -1"),
        ("val_subset", 0, "must be at least 1, got 0; leave it out for the whole set"),
        ("test_images", 0, "must be at least 1, got 0; leave it out for the whole set"),
        ("test_offset", -1, "must be at least 0, got -1"),
        ("crop_padding", -2, "must be at least 0"),
    ],
)
def test_an_argument_out_of_range_is_named(argument: str, value: int, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"{argument} {remedy}"):
        DigitsData(**{argument: value})


def test_a_validation_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="val_images 1397 leaves nothing of the 1397 training images"):
        DigitsData(val_images=1397).setup("fit")


@pytest.mark.parametrize(("data", "folder"), [(CIFAR10Data, "cifar-10-batches-py"), (CIFAR100Data, "cifar-100-python")])
def test_missing_cifar_files_say_what_downloads_them(data: Any, folder: str, tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=f"no intact folder {folder} in .*; set root to where it is, or download to true"):
        data(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(("data", "name", "classes"), [(CIFAR10Data, "cifar10", 10), (CIFAR100Data, "cifar100", 100)])
def test_cifar_pixels_and_labels_arrive_as_stored(data: Any, name: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stored:
        """What torchvision's classes hold."""

        def __init__(self, root: object, train: bool = True) -> None:
            count = 3 * classes if train else classes
            self.data = np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
            self.targets = [index % classes for index in range(count)]

    monkeypatch.setattr(data, "dataset", Stored)
    module = data("unused", val_images=classes, eval_batch_size=7)
    assert (module.num_classes, module.name, module.size) == (classes, name, 32)
    module.setup("fit")
    assert torch.bincount(module.split("val").labels).tolist() == [1] * classes
    assert torch.bincount(module.split("train").labels).tolist() == [2] * classes
    stored = Stored("", train=False)
    for batch in module.test_dataloader():
        for image, label, index in zip(*batch, strict=True):
            assert int(label) == stored.targets[index]
            assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), stored.data[index])


def test_cifar_is_downloaded_only_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(CIFAR10Data, "dataset", staticmethod(lambda root, download=False: asked.append(download)))
    CIFAR10Data(str(tmp_path)).prepare_data()
    assert asked == []
    CIFAR10Data(str(tmp_path), download=True).prepare_data()
    assert asked == [True]
