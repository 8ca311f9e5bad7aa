"""Distortion figures against torchmetrics, numpy and a real 8-bit round trip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import peak_signal_noise_ratio

from gatewatt.metrics import linf_levels, mse_levels2, psnr_db, round_to_8bit
from gatewatt.metrics.distortion import psnr_of_mse
from gatewatt.metrics.record import psnr_of_mse as psnr_of_mse_without_torch


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(5, 3, 8, 6, generator=generator)
    return clean, (clean + 0.05 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)


def test_psnr_equals_torchmetrics_image_by_image(pair):
    clean, adversarial = pair
    levels = zip(255 * adversarial.double(), 255 * clean.double(), strict=True)
    expected = [peak_signal_noise_ratio(theirs, ours, data_range=255.0).item() for theirs, ours in levels]
    assert psnr_db(clean, adversarial).tolist() == pytest.approx(expected, abs=1e-6)


def test_mse_and_linf_equal_numpy_in_float64(pair):
    clean, adversarial = pair
    difference = 255 * (adversarial.numpy().astype(np.float64) - clean.numpy().astype(np.float64))
    assert mse_levels2(clean, adversarial).tolist() == pytest.approx((difference**2).mean(axis=(1, 2, 3)), rel=1e-12)
    assert linf_levels(clean, adversarial).tolist() == pytest.approx(np.abs(difference).max(axis=(1, 2, 3)), rel=1e-12)
    assert mse_levels2(clean, adversarial).dtype == torch.float64


def test_identical_images_have_no_error_and_infinite_psnr(pair):
    clean, _ = pair
    assert mse_levels2(clean, clean).tolist() == [0.0] * 5
    assert psnr_db(clean, clean).tolist() == [math.inf] * 5
    assert psnr_of_mse_without_torch(0.0) == math.inf


@pytest.mark.parametrize(("mse", "decibel"), [(0.11, 57.7), (0.25, 54.2), (365.0, 22.5), (255.0**2, 0.0)])
def test_psnr_of_the_mse_values_of_the_literature(mse, decibel):
    assert psnr_of_mse(torch.tensor(mse)).item() == pytest.approx(decibel, abs=0.06)
    assert psnr_of_mse_without_torch(mse) == pytest.approx(decibel, abs=0.06)


@settings(deadline=None)
@given(st.floats(1e-300, 1e5))
def test_both_psnr_formulas_agree_and_never_overflow(mse):
    assert psnr_of_mse(torch.tensor(mse, dtype=torch.float64)).item() == pytest.approx(psnr_of_mse_without_torch(mse), rel=1e-12)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=50))
def test_rounding_equals_saving_and_loading_as_uint8(pixels):
    images = torch.tensor(pixels, dtype=torch.float32)
    rounded = round_to_8bit(images)
    assert torch.equal(rounded, (images * 255).round().to(torch.uint8).float() / 255)
    assert torch.equal(round_to_8bit(rounded), rounded)
    assert (rounded - images).abs().max().item() <= 0.5 / 255 + 1e-6


def test_every_8bit_level_survives_rounding():
    levels = torch.arange(256, dtype=torch.uint8).float() / 255
    assert torch.equal(round_to_8bit(levels), levels)


def test_rounding_random_pixels_costs_a_twelfth_of_a_squared_level():
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert mse_levels2(images, round_to_8bit(images)).mean().item() == pytest.approx(1 / 12, rel=0.02)


@pytest.mark.parametrize("figure", [mse_levels2, psnr_db, linf_levels])
def test_a_pixel_that_is_not_finite_is_refused_and_its_image_named(pair, figure):
    clean, adversarial = pair
    adversarial[3, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="image 3 of the batch"):
        figure(clean, adversarial)
    with pytest.raises(ValueError, match="one shape"):
        figure(clean, adversarial[:1])
