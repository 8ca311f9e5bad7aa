"""Where perturbations live: nothing at zero, valid images everywhere, and derivatives that autograd confirms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatewatt.attacks import LinfBall, ProjectionSpace, Space, TanhSpace

SPACES = [TanhSpace(), ProjectionSpace(), LinfBall(8 / 255)]
NAMES = ["tanh", "projection", "ball"]


@pytest.fixture
def pixels() -> Tensor:
    """Random images with some pixels at the ends of the range."""
    drawn = torch.rand(16, 3, 8, 8)
    drawn[0, 0, 0], drawn[1, 1, 1] = 0.0, 1.0
    return drawn


def psnr(clean: Tensor, other: Tensor) -> list[float]:
    """Independent of the package: -10 log10 of the mean squared error on the [0, 1] scale, per image."""
    errors = (clean.double() - other.double()).square().mean((1, 2, 3)).tolist()
    return [math.inf if error == 0 else -10 * math.log10(error) for error in errors]


@pytest.mark.parametrize("space", SPACES, ids=NAMES)
def test_no_perturbation_changes_nothing(space: Space, pixels: Tensor) -> None:
    assert min(psnr(pixels, space.image(space.encode(pixels), torch.zeros_like(pixels)))) > 90


def test_tanh_space_is_off_by_its_margin_at_the_ends_of_the_range_alone(pixels: Tensor) -> None:
    ends = torch.tensor([0.0, 1.0]).repeat(96).view(1, 3, 8, 8)
    changed = TanhSpace(1e-4).image(TanhSpace(1e-4).encode(ends), torch.zeros_like(ends))
    torch.testing.assert_close((changed - ends).abs(), torch.full_like(ends, 1e-4), rtol=0, atol=2e-7)
    inside = pixels.clamp(2e-4, 1 - 2e-4)
    torch.testing.assert_close(TanhSpace(1e-4).image(TanhSpace(1e-4).encode(inside), torch.zeros_like(inside)), inside, rtol=0, atol=1e-6)


def test_the_paper_read_literally_would_start_far_away(pixels: Tensor) -> None:
    # Why the space starts from atanh(2x - 1): Eq. 2 maps x to (tanh(x) + 1) / 2 before the first step.
    assert max(psnr(pixels, (torch.tanh(pixels) + 1) / 2)) < 20


@pytest.mark.parametrize("space", SPACES, ids=NAMES)
def test_the_pullback_is_the_gradient_of_autograd(space: Space) -> None:
    pixels = 0.2 + 0.6 * torch.rand(3, 3, 4, 4, dtype=torch.float64)
    delta = (0.03 * torch.randn(3, 3, 4, 4, dtype=torch.float64)).requires_grad_()
    anchor = space.encode(pixels)
    perturbed = space.image(anchor, delta)
    outer = torch.randn_like(perturbed)
    (expected,) = torch.autograd.grad((outer * perturbed).sum(), delta)
    torch.testing.assert_close(space.pullback(perturbed.detach(), outer), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("space", SPACES, ids=NAMES)
@pytest.mark.parametrize("size", [1e-3, 0.3, 30.0, 1e6])
def test_images_stay_valid_however_large_the_step(space: Space, size: float, pixels: Tensor) -> None:
    anchor = space.encode(pixels)
    delta = space.restrict(anchor, size * torch.randn_like(pixels))
    perturbed = space.image(anchor, delta)
    assert bool(((perturbed >= 0) & (perturbed <= 1)).all())
    assert perturbed.shape == pixels.shape


@pytest.mark.parametrize("space", SPACES[1:], ids=NAMES[1:])
def test_what_is_restricted_needs_no_clipping_and_no_further_restriction(space: Space, pixels: Tensor) -> None:
    delta = space.restrict(pixels, 0.7 * torch.randn_like(pixels))
    torch.testing.assert_close(space.image(pixels, delta), pixels + delta, rtol=0, atol=1e-7)
    torch.testing.assert_close(space.restrict(pixels, delta), delta, rtol=0, atol=1e-7)


@pytest.mark.parametrize("eps", [1 / 255, 8 / 255, 0.3])
def test_a_ball_keeps_every_pixel_within_eps_and_lets_it_reach_the_edge(eps: float, pixels: Tensor) -> None:
    space = LinfBall(eps)
    perturbed = space.image(pixels, space.restrict(pixels, torch.randn_like(pixels)))
    change = (perturbed - pixels).abs()
    assert change.max().item() == pytest.approx(eps, abs=1e-6)


def test_within_the_range_every_image_can_be_reached_in_tanh_space(pixels: Tensor) -> None:
    space, wanted = TanhSpace(), torch.rand_like(pixels).clamp(1e-3, 1 - 1e-3)
    delta = torch.atanh(2 * wanted - 1) - space.encode(pixels)
    torch.testing.assert_close(space.image(space.encode(pixels), delta), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("margin", [0.0, -1e-4, 0.5, float("nan")])
def test_a_margin_without_a_finite_atanh_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match=r"margin must be in \(0, 0.5\), got"):
        TanhSpace(margin)


@pytest.mark.parametrize("eps", [0.0, -0.1, float("nan")])
def test_a_ball_has_a_radius(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be positive, got"):
        LinfBall(eps)
