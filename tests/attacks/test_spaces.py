"""Where perturbations live: nothing at zero, valid images everywhere, and derivatives that autograd confirms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatewatt.attacks import Ball, L2Ball, LinfBall, ProjectionSpace, Space, TanhSpace

SPACES = [TanhSpace(), ProjectionSpace(), LinfBall(8 / 255), L2Ball(0.5)]
NAMES = ["tanh", "projection", "linf", "l2"]
BALLS = [LinfBall, L2Ball]


def norms(ball: Ball, delta: Tensor) -> Tensor:
    """Independent of the package: the norm that the ball bounds, per image, in float64."""
    values = delta.double().abs().flatten(1)
    return values.max(1).values if isinstance(ball, LinfBall) else (values**2).sum(1) ** 0.5


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


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("eps", [0.0, -0.1, float("nan"), float("inf")])
def test_a_ball_has_a_radius(ball: type[Ball], eps: float) -> None:
    with pytest.raises(ValueError, match=r"eps must be finite and positive, a radius on the \[0, 1\] scale, got"):
        ball(eps)


# ---- balls ----


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("eps", [1 / 255, 0.5, 2.0])
@pytest.mark.parametrize("size", [1e-3, 0.1, 100.0])
def test_perturbations_stay_in_the_ball_and_images_valid(ball: type[Ball], eps: float, size: float, pixels: Tensor) -> None:
    space = ball(eps)
    delta = space.restrict(pixels, size * torch.randn_like(pixels))
    perturbed = space.image(pixels, delta)
    assert bool(((perturbed >= 0) & (perturbed <= 1)).all())
    assert norms(space, perturbed - pixels).max() <= eps + 1e-6


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("eps", [0.01, 0.2])
def test_what_is_inside_stays_and_what_is_outside_comes_to_the_surface(ball: type[Ball], eps: float) -> None:
    space, grey = ball(eps), torch.full((5, 3, 8, 8), 0.5)
    direction = torch.randn_like(grey)
    direction = direction / norms(space, direction).float().view(-1, 1, 1, 1)
    inside = space.restrict(grey, 0.9 * eps * direction)
    torch.testing.assert_close(inside, 0.9 * eps * direction, rtol=0, atol=1e-7)
    outside = space.ball(3 * eps * direction)
    assert norms(space, outside).tolist() == pytest.approx([eps] * 5, abs=1e-6)
    # No other point of the ball is nearer.
    for _ in range(50):
        other = space.ball(outside + 0.1 * eps * torch.randn_like(outside))
        nearer = (other - 3 * eps * direction).square().sum((1, 2, 3)) < (outside - 3 * eps * direction).square().sum((1, 2, 3)) - 1e-6
        assert not nearer.any()


@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20])
def test_no_direction_of_norm_1_descends_faster(ball: type[Ball], scale: float) -> None:
    space, gradient = ball(0.5), torch.randn(6, 3, 4, 4)
    gradient[2] = 0.0
    found = space.steepest(scale * gradient)
    assert bool(torch.isfinite(found).all())
    assert not found[2].any()
    kept = [0, 1, 3, 4, 5]
    assert norms(space, found)[kept].tolist() == pytest.approx([1] * 5, abs=1e-6)
    values = gradient.double().flatten(1)
    # Hoelder: the most that a direction of norm 1 can gain is the dual norm of the gradient.
    dual = values.abs().sum(1) if ball is LinfBall else (values**2).sum(1) ** 0.5
    assert (found.double().flatten(1) * values).sum(1).tolist() == pytest.approx((-dual).tolist(), rel=1e-5)


@pytest.mark.parametrize("ball", BALLS)
def test_starts_by_chance_are_in_the_ball_and_all_over_it(ball: type[Ball]) -> None:
    space, noise = ball(0.3), torch.rand(40, 3, 8, 8)
    start = space.within(noise)
    assert norms(space, start).max() <= 0.3 + 1e-6
    assert norms(space, start).min() > 0.29
    assert start.mean().abs() < 0.01
    assert bool(torch.isfinite(space.within(torch.zeros(1, 3, 2, 2))).all())
