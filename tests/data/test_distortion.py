"""Distorted images and mixed batches: what they are, and that they depend on the key of the batch, or the step, alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gatewatt.data import Augmentation, BatchKey, Distortion, FolderData, MemoryImages, Mixing
from gatewatt.data.order import generator

EVERYTHING = Distortion(rand_augment=9, color=True, erasing=0.25)


def pictures(count: int = 12, side: int = 16) -> torch.Tensor:
    """Smooth uint8 images."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(2)) * 255
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear").to(torch.uint8)


@pytest.mark.parametrize("distortion", [Distortion(rand_augment=9), Distortion(color=True), Distortion(erasing=1.0), EVERYTHING])
def test_a_batch_in_memory_is_a_function_of_its_key(distortion: Distortion) -> None:
    images = MemoryImages(pictures(), torch.arange(12), Augmentation(2, distortion=distortion))
    key, before = BatchKey(3, 1, 4, torch.arange(12)), torch.get_rng_state()
    first, again, later = images[key], images[key], images[key._replace(epoch=2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, later.images)
    assert first.images.shape == (12, 3, 16, 16)
    assert 0 <= first.images.min() < first.images.max() <= 1
    plain = MemoryImages(pictures(), torch.arange(12), Augmentation(2))[key]
    changed = (first.images != plain.images).flatten(1).any(1)
    # RandAugment also draws operations that leave an image as it is.
    assert changed.float().mean() > 0.5


def test_without_distortion_the_draws_are_those_of_crop_and_flip_alone() -> None:
    images = pictures()
    assert torch.equal(Augmentation(2)(images, generator(1)), Augmentation(2, distortion=Distortion())(images, generator(1)))


def test_erasing_paints_one_rectangle_in_the_mean_colour() -> None:
    black = torch.zeros(3, 32, 32, dtype=torch.uint8)
    torch.manual_seed(0)
    for _ in range(20):
        painted = Distortion(erasing=1.0)(black)
        rows, columns = (painted[0] > 0).nonzero(as_tuple=True)
        area = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        assert int((painted[0] > 0).sum()) == int(area)
        assert 0.01 < area / 32**2 < 0.35
        assert painted[:, rows[0], columns[0]].tolist() == [124, 116, 104]


def test_the_magnitude_is_the_originals_of_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = Distortion(rand_augment=9).steps
    seen: list[float] = []
    monkeypatch.setattr(step, "_apply_image_or_video_transform", lambda image, name, magnitude, **_: seen.append((name, magnitude)) or image)
    for seed in range(60):
        torch.manual_seed(seed)
        step(torch.zeros(3, 8, 8, dtype=torch.uint8))
    strongest = {name: abs(magnitude) for name, magnitude in seen}
    assert len(seen) == 120
    assert strongest["Rotate"] == pytest.approx(27)
    assert strongest["Brightness"] == pytest.approx(0.81)
    assert strongest["Solarize"] == pytest.approx(0.1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_files_are_distorted_like_images_in_memory(in_memory: bool, tmp_path: Path) -> None:
    for index, image in enumerate(pictures(6, 20).permute(0, 2, 3, 1).numpy()):
        folder = tmp_path / "train" / f"c{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{index}.png")
    batches = []
    for distortion in (EVERYTHING, EVERYTHING, None):
        data = FolderData(str(tmp_path), size=16, batch_size=6, in_memory=in_memory, val_images=0, distortion=distortion)
        batches.append(next(iter(data.train_dataloader())).images)
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


# ---- whole batches ----


def test_mixup_is_a_convex_combination_of_neighbours() -> None:
    torch.manual_seed(1)
    images, labels = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 2])
    mixed, shares = Mixing(0.8, 0.0)(images, labels, 3)
    share = shares[0, 0].item()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))
    one_hot = torch.eye(3)[labels]
    torch.testing.assert_close(shares, share * one_hot + (1 - share) * one_hot.roll(1, 0))


def test_cutmix_pastes_a_rectangle_and_shares_by_its_area() -> None:
    torch.manual_seed(3)
    images, labels, areas = torch.rand(4, 3, 8, 8), torch.arange(4), []
    for _ in range(20):
        mixed, shares = Mixing(0.0, 1.0)(images, labels, 4)
        pasted = (mixed != images).any(1)
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        areas.append(int(rows * columns))
        assert all(int(image.sum()) == areas[-1] for image in pasted), "one rectangle, the same for every image"
        assert bool(((mixed == images.roll(1, 0)) | ~pasted[:, None]).all())
        assert shares.diagonal().tolist() == pytest.approx([1 - areas[-1] / 64] * 4)
        assert shares.sum(1).tolist() == pytest.approx([1] * 4)
    assert len(set(areas)) > 5


def test_both_kinds_occur_as_often_as_asked_and_pixels_stay_pixels() -> None:
    torch.manual_seed(0)
    images, labels = torch.ones(4, 3, 6, 6), torch.arange(4)
    images[::2] = 0
    kinds = []
    for _ in range(200):
        mixed, shares = Mixing(switch=0.25)(images, labels, 4)
        assert mixed.min() >= 0
        assert mixed.max() <= 1
        assert shares.sum(1).tolist() == pytest.approx([1] * 4)
        kinds.append(bool(((mixed == 0) | (mixed == 1)).all()))
    assert 0.15 < sum(kinds) / 200 < 0.4


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Distortion, {"rand_augment": 11}, "rand_augment must be a magnitude from 0 to 10, got 11"),
        (Distortion, {"erasing": 1.5}, r"erasing must be a share of the images in \[0, 1\], got 1.5"),
        (Mixing, {"mixup": -1.0}, "mixup and cutmix must be at least 0"),
        (Mixing, {"mixup": 0.0, "cutmix": 0.0}, "one of them positive"),
        (Mixing, {"switch": 2.0}, r"switch in \[0, 1\]"),
    ],
)
def test_a_value_out_of_range_is_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)
