"""Complexity gradient masking against a projection written per image in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatewatt.attacks import mask_conflict


def masked_by_hand(closed: NDArray[np.float64], opened: NDArray[np.float64]) -> NDArray[np.float64]:
    """Eqs. 10-12 for one image: drop the component along ``opened`` if it points against it."""
    inner = float((closed * opened).sum())
    if inner >= 0:
        return closed
    return closed - inner / float((opened * opened).sum()) * opened


def draws(count: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Pairs of gradients of all sizes, about half of them in conflict."""
    generator = torch.Generator().manual_seed(11)
    pair = [torch.randn(count, 3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    scales = [10 ** (6 * torch.rand(count, 1, 1, 1, generator=generator, dtype=torch.float64) - 3) for _ in range(2)]
    closed, opened = (gradient * scale for gradient, scale in zip(pair, scales, strict=True))
    return closed.to(dtype), opened.to(dtype)


def inner(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((1, 2, 3))


def test_the_rectified_gradient_is_the_projection_of_1000_images() -> None:
    closed, opened = draws(1000)
    expected = np.stack([masked_by_hand(c, o) for c, o in zip(closed.numpy(), opened.numpy(), strict=True)])
    size = closed.flatten(1).norm(dim=1).numpy()
    error = np.abs(mask_conflict(closed, opened).numpy() - expected).max((1, 2, 3))
    assert (error / size).max() < 1e-10


def test_it_is_orthogonal_where_the_two_conflicted_and_unchanged_where_not() -> None:
    closed, opened = draws(1000)
    rectified, conflicts = mask_conflict(closed, opened), inner(closed, opened) < 0
    assert 400 < int(conflicts.sum()) < 600
    cosine = inner(rectified, opened) / (rectified.flatten(1).norm(dim=1) * opened.flatten(1).norm(dim=1))
    assert cosine[conflicts].abs().max() < 1e-12
    assert torch.equal(rectified[~conflicts], closed[~conflicts])
    assert bool((rectified[conflicts] != closed[conflicts]).flatten(1).any(1).all())


def test_masking_shortens_and_never_turns_against_the_loss() -> None:
    closed, opened = draws(1000)
    rectified = mask_conflict(closed, opened)
    assert bool((inner(rectified, closed) >= -1e-12 * inner(closed, closed)).all())
    assert bool((rectified.flatten(1).norm(dim=1) <= closed.flatten(1).norm(dim=1) * (1 + 1e-12)).all())


def test_masking_twice_is_masking_once() -> None:
    closed, opened = draws(200)
    once = mask_conflict(closed, opened)
    size = closed.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert ((mask_conflict(once, opened) - once).abs() / size).max() < 1e-12


@pytest.mark.parametrize("size", [0.0, 1e-13, 1e-25])
def test_without_an_open_gate_nothing_is_masked(size: float) -> None:
    closed, opened = draws(20)
    opened[::2] *= size / opened[::2].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    rectified = mask_conflict(closed, opened)
    assert bool(torch.isfinite(rectified).all())
    assert torch.equal(rectified[::2], closed[::2])
    assert not torch.equal(rectified[1::2], closed[1::2])


def test_one_images_gates_do_not_shield_anothers() -> None:
    closed = torch.tensor([[1.0, -1.0], [1.0, -1.0]]).view(2, 1, 1, 2)
    opened = torch.tensor([[0.0, 0.0], [0.0, 1.0]]).view(2, 1, 1, 2)
    assert mask_conflict(closed, opened).flatten(1).tolist() == [[1, -1], [1, 0]]
    many_closed, many_open = draws(60)
    together = mask_conflict(many_closed, many_open)
    assert torch.equal(together, torch.cat([mask_conflict(many_closed[i : i + 1], many_open[i : i + 1]) for i in range(60)]))


@pytest.mark.parametrize("size", [1e-8, 1e-18, 1e-28])
def test_gradients_too_small_to_be_squared_in_float32_are_projected_all_the_same(size: float) -> None:
    # Deep gates that are firmly closed have gradients like these.
    closed, opened = draws(100)
    closed = closed / closed.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * size
    opened = opened / opened.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 1e-6
    expected = np.stack([masked_by_hand(c, o) for c, o in zip(closed.numpy(), opened.numpy(), strict=True)])
    rectified = mask_conflict(closed.float(), opened.float()).double().numpy()
    assert np.abs(rectified - expected).max() < 1e-5 * size
