"""Noise: as large as it says, valid, a function of the image alone, and blind to the network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.toys import LEDGER, Logistic
from torch import Tensor

from gatewatt.attacks import Ball, L2Ball, LinfBall, Noise
from gatewatt.attacks.base import image_noise

KINDS = ["uniform", "gaussian", "shift", "flat"]
BALLS: list[Ball] = [LinfBall(8 / 255), L2Ball(0.5)]
NAMES = ["linf", "l2"]


@pytest.fixture
def pixels() -> Tensor:
    """Random images, one black and one white."""
    drawn = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    drawn[0], drawn[1] = 0.0, 1.0
    return drawn


class Blind(Logistic):
    """Must not be asked."""

    def forward(self, *arguments: Any) -> Any:
        raise AssertionError("noise asked the network")


def change(images: Tensor, **settings: Any) -> Tensor:
    return Noise(**settings)(Blind().eval(), images, ledger=LEDGER).images.double() - images.double()


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_noise_is_valid_and_in_the_ball(kind: str, space: Ball, pixels: Tensor) -> None:
    moved = change(pixels, kind=kind, space=space)
    perturbed = pixels + moved
    assert bool(((perturbed >= 0) & (perturbed <= 1)).all())
    assert (moved.abs().max() if isinstance(space, LinfBall) else moved.flatten(1).norm(dim=1).max()) <= space.eps + 1e-6


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_noise_has_the_norm_it_may_have_at_the_ends_of_the_range_too(kind: str, pixels: Tensor) -> None:
    assert change(pixels, kind=kind, space=L2Ball(0.5)).flatten(1).norm(dim=1).tolist() == pytest.approx([0.5] * 8, rel=0.02)
    sizes = change(pixels, kind=kind, space=LinfBall(0.03)).abs().mean((1, 2, 3))
    # Means of |U(-1, 1)| and of |N(0, 1/2)| cut off at 1.
    assert sizes.tolist() == pytest.approx([0.03 * {"uniform": 0.5, "gaussian": 0.39}[kind]] * 8, rel=0.1)


def test_a_shift_is_one_number_away_from_the_nearer_end(pixels: Tensor) -> None:
    dark, bright = torch.full((1, 3, 4, 4), 0.2), torch.full((1, 3, 4, 4), 0.8)
    torch.testing.assert_close(change(dark, kind="shift", space=LinfBall(0.1)), torch.full((1, 3, 4, 4), 0.1).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        change(bright, kind="shift", space=L2Ball(0.48)), torch.full((1, 3, 4, 4), -0.48 / 48**0.5).double(), rtol=0, atol=1e-6
    )
    assert change(pixels, kind="shift", space=L2Ball(0.5)).flatten(1).norm(dim=1)[:2].tolist() == pytest.approx([0.5, 0.5], rel=1e-5)


def test_a_flat_image_is_the_mean_colour_and_never_beyond(pixels: Tensor) -> None:
    pixels = pixels[2:]
    wide = pixels + change(pixels, kind="flat", space=L2Ball(1000.0))
    torch.testing.assert_close(wide, pixels.double().mean((2, 3), keepdim=True).expand_as(wide), rtol=0, atol=1e-6)
    narrow = change(pixels, kind="flat", space=L2Ball(0.5))
    assert narrow.flatten(1).norm(dim=1).tolist() == pytest.approx([0.5] * 6, rel=1e-5)
    towards = pixels.double().mean((2, 3), keepdim=True) - pixels
    assert torch.cosine_similarity(narrow.flatten(1), towards.flatten(1)).tolist() == pytest.approx([1] * 6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gets_what_its_images_get_one_by_one(kind: str, pixels: Tensor) -> None:
    together = change(pixels, kind=kind)
    for index, image in enumerate(pixels):
        assert torch.equal(change(image[None], kind=kind)[0], together[index])
    # Not to the bit: sums over pixels in another order.
    torch.testing.assert_close(change(pixels.contiguous(memory_format=torch.channels_last), kind=kind), together, rtol=0, atol=1e-6)


# ---- where all attacks get their random numbers from ----


def test_noise_depends_on_the_image_the_seed_and_the_draw_and_on_nothing_else(pixels: Tensor) -> None:
    noise = image_noise(pixels, 3)
    torch.manual_seed(99)
    assert torch.equal(image_noise(pixels, 3), noise)
    assert torch.equal(image_noise(pixels.flip(0), 3).flip(0), noise)
    assert torch.equal(image_noise(pixels.contiguous(memory_format=torch.channels_last), 3), noise)
    for index, image in enumerate(pixels):
        assert torch.equal(image_noise(image[None], 3)[0], noise[index])
    seen = [noise, image_noise(pixels, 4), image_noise(pixels, 3 + 2**32), image_noise(pixels, 3, 1), image_noise(pixels, 4, 1)]
    touched = pixels.clone()
    touched[:, 1, 2, 3] = 0.123
    seen.append(image_noise(touched, 3))
    flat = torch.cat(seen).flatten(1)
    # All of them are different, and unrelated.
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.2
    assert flat.min() >= 0
    assert flat.max() < 1
    assert flat.mean().item() == pytest.approx(0.5, abs=0.01)


def test_equal_images_get_equal_noise() -> None:
    noise = image_noise(torch.full((3, 3, 4, 4), 0.5), 0)
    assert torch.equal(noise[0], noise[1])
    assert torch.equal(noise[0], noise[2])


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be uniform, gaussian, shift or flat, got 'pink'"):
        Noise("pink")  # type: ignore[arg-type]
    assert [Noise(kind).name for kind in ("uniform", "flat")] == ["Noise-uniform", "Noise-flat"]  # type: ignore[arg-type]
