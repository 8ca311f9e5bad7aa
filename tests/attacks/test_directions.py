"""Complexity gradient masking against a projection written per image in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatewatt.attacks import ComplexityLoss, ComplexityOnly, ConflictMasking, GateLoss, HingeLoss, Joint, PowerLoss, UnitLength, mask_conflict
from gatewatt.gating import GateTable


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


# ---- directions, on gates that are logistic in the pixels ----

LAM = torch.tensor([0.5, 1.0, 2.0, 0.3, 1.2], dtype=torch.float64)


class Gates:
    """Five gates ``sigmoid(W x + b)`` in float64, and the gradient function that the loops hand to a direction."""

    def __init__(self, count: int = 12) -> None:
        generator = torch.Generator().manual_seed(4)
        self.weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
        self.images = torch.rand(count, 3, 2, 2, generator=generator, dtype=torch.float64)

    def table(self, images: Tensor) -> GateTable:
        score = torch.sigmoid((images.flatten(1) - 0.5) @ self.weight.T)
        return GateTable(score, torch.full_like(score, 0.5), (score >= 0.5).double())

    def __call__(self, direction: Joint | ConflictMasking | ComplexityOnly | UnitLength, loss: GateLoss, scale: float = 1.0) -> Tensor:
        images = self.images.clone().requires_grad_()
        return direction(loss, self.table(images), scale * LAM, lambda losses, more: torch.autograd.grad(losses.sum(), images, retain_graph=more)[0])

    def differences(self, loss: GateLoss) -> Tensor:
        """The gradient of a loss by central differences, pixel by pixel."""
        step, found = 1e-6, torch.zeros_like(self.images)
        for index in np.ndindex(3, 2, 2):
            moved = torch.zeros(3, 2, 2, dtype=torch.float64)
            moved[index] = step
            above, below = (loss(self.table(self.images + sign * moved), LAM) for sign in (1, -1))
            found[(slice(None), *index)] = (above - below) / (2 * step)
        return found


class OpenGates(GateLoss):
    """Eq. 8, a second time."""

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        return torch.stack([-sum(w * max(g, 0.5) for w, g in zip(weights, scores, strict=True)) for scores in table.score])


@pytest.mark.parametrize("loss", [ComplexityLoss(), PowerLoss(), HingeLoss()])
def test_every_direction_is_that_of_finite_differences(loss: GateLoss) -> None:
    gates = Gates()
    closed, opened = gates.differences(loss), gates.differences(OpenGates())
    masked = torch.tensor(np.stack([masked_by_hand(c, o) for c, o in zip(closed.numpy(), opened.numpy(), strict=True)]))
    expected = {ComplexityOnly(): closed, Joint(): closed + opened, ConflictMasking(): masked}
    for direction, gradient in expected.items():
        torch.testing.assert_close(gates(direction, loss), gradient, rtol=0, atol=1e-8)
        unit = torch.stack([one / one.square().sum().sqrt() for one in gradient])
        torch.testing.assert_close(gates(UnitLength(direction), loss), unit, rtol=0, atol=1e-7)
    # The hinge counts open gates too, and so is hardly ever at odds with them.
    assert isinstance(loss, HingeLoss) or bool((inner(closed, opened) < 0).any())


def test_unit_length_masks_unless_told_otherwise() -> None:
    assert torch.equal(Gates()(UnitLength(), ComplexityLoss()), Gates()(UnitLength(ConflictMasking()), ComplexityLoss()))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_unit_length_does_not_depend_on_the_size_of_the_loss(scale: float) -> None:
    direction = UnitLength(ComplexityOnly())
    torch.testing.assert_close(Gates()(direction, PowerLoss(), scale), Gates()(direction, PowerLoss()), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1e-35, 1e-25, 1e-12, 1.0, 1e25])
def test_gradients_too_small_or_large_to_be_squared_in_float32_have_length_1_all_the_same(size: float) -> None:
    gradient = torch.randn(20, 3, 4, 5)
    gradient[3] = 0.0
    found = UnitLength(ComplexityOnly())(ComplexityLoss(), Gates().table(Gates().images), LAM, lambda losses, more: size * gradient)
    lengths = found.double().square().sum((1, 2, 3)).sqrt()
    assert lengths[3] == 0
    assert torch.cat([lengths[:3], lengths[4:]]).tolist() == pytest.approx([1] * 19, abs=1e-6)
