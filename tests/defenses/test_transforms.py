"""Input defenses against independent codecs and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from gatewatt.defenses import JPEG, BitDepth, InputDefense, MedianFilter

DEFENSES = [JPEG(), JPEG(quality=20), MedianFilter(), MedianFilter(5), BitDepth(), BitDepth(1)]
NAMES = [" ".join(map(str, defense.settings.values())) for defense in DEFENSES]


@pytest.fixture(params=DEFENSES, ids=NAMES)
def defense(request: pytest.FixtureRequest) -> InputDefense:
    return request.param


# Its codec is to move to another package; until then it is the second one at hand.
@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision are deprecated:DeprecationWarning")
@pytest.mark.parametrize("quality", [1, 30, 75, 100])
def test_jpeg_is_what_another_codec_makes_of_the_8_bit_image(quality: int, images: Tensor) -> None:
    levels = (255 * images).round().to(torch.uint8)
    other = torch.stack([decode_jpeg(encode_jpeg(image, quality)) for image in levels])
    assert torch.equal((255 * JPEG(quality)(images)).round().to(torch.uint8), other)
    assert not torch.equal(other, levels)


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_median_is_the_middle_of_each_window(kernel: int, images: Tensor) -> None:
    border = kernel // 2
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (border, border), (border, border)), mode="reflect")
    expected = np.empty(images.shape, dtype=np.float32)
    for row in range(32):
        for column in range(32):
            expected[:, :, row, column] = np.median(padded[:, :, row : row + kernel, column : column + kernel], axis=(2, 3))
    assert np.array_equal(MedianFilter(kernel)(images).numpy(), expected)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bit_depth_takes_the_nearest_level(bits: int, images: Tensor) -> None:
    levels = np.linspace(0, 1, 2**bits)
    nearest = levels[np.abs(images.numpy()[..., None] - levels).argmin(-1)]
    assert np.allclose(BitDepth(bits)(images).numpy(), nearest, atol=1e-7)
    assert len(BitDepth(bits)(images).unique()) <= 2**bits


def test_images_stay_images_each_on_its_own(defense: InputDefense, images: Tensor) -> None:
    defended = defense(images)
    assert defended.shape == images.shape
    assert defended.dtype == torch.float32
    assert 0 <= defended.min() <= defended.max() <= 1
    assert not torch.equal(defended, images)
    assert torch.equal(defended, torch.cat([defense(image[None]) for image in images]))
    assert torch.equal(defended, defense(images.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize("defense", [JPEG(), JPEG(quality=20), BitDepth(), BitDepth(1)], ids=["jpeg 75", "jpeg 20", "4 bits", "1 bit"])
def test_the_gradient_goes_straight_through_what_has_none_of_its_own(defense: InputDefense, images: Tensor) -> None:
    images.requires_grad_()
    weights = torch.randn(images.shape)
    (gradient,) = torch.autograd.grad((defense(images) * weights).sum(), images)
    assert torch.equal(gradient, weights)


def test_the_median_has_its_own_derivative() -> None:
    # Values a hundredth apart, so that finite differences change no order.
    image = (torch.randperm(75).double() / 100).view(1, 3, 5, 5).requires_grad_()
    assert torch.autograd.gradcheck(MedianFilter(), (image,), eps=1e-4)


def test_a_nan_pixel_is_not_laundered(defense: InputDefense, images: Tensor) -> None:
    if isinstance(defense, MedianFilter):
        images[0] = torch.nan  # one alone is no median
    images[0, 1, 5, 5] = torch.nan
    with np.errstate(invalid="ignore"):
        assert bool(defense(images)[0].isnan().any())
        assert not bool(defense(images)[1:].isnan().any())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: JPEG(0), "quality must be in 1 to 100, got 0"),
        (lambda: JPEG(101), "quality must be in 1 to 100, got 101"),
        (lambda: MedianFilter(4), "kernel must be odd and at least 3, got 4"),
        (lambda: MedianFilter(1), "kernel must be odd and at least 3, got 1"),
        (lambda: MedianFilter(9)(torch.zeros(1, 3, 4, 4)), "needs images larger than 4 pixels"),
        (lambda: BitDepth(0), "bits must be in 1 to 8, got 0"),
        (lambda: BitDepth(9), "bits must be in 1 to 8, got 9"),
    ],
)
def test_wrong_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
