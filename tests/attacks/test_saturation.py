"""Slopes of saturated gates: values and ordinary slopes to the bit, and those that float32 had rounded away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.attacks import HingeLoss, unsaturated
from gatewatt.gating import GateTable, exit_score

SIGMOIDS: list[Callable[[Tensor], Tensor]] = [
    torch.sigmoid,
    lambda x: x.sigmoid(),
    nn.Sigmoid(),
    functional.sigmoid,
    lambda x: torch.sigmoid(input=x),
]
SOFTMAXES: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.softmax(x, 1),
    lambda x: x.softmax(dim=-1),
    nn.Softmax(1),
    lambda x: functional.softmax(x, dim=1),
    lambda x: functional.softmax(x, 1, dtype=torch.float32),
    lambda x: torch.softmax(x, dim=1, dtype=torch.float32),
]


def value_and_slope(function: Callable[[Tensor], Tensor], x: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad((outer * value).sum(), x)[0]


@pytest.mark.parametrize("function", [*SIGMOIDS, *SOFTMAXES])
def test_ordinary_values_and_slopes_stay_as_they_are(function: Callable[[Tensor], Tensor]) -> None:
    x, outer = 3 * torch.randn(40, 6), torch.randn(40, 6)
    expected = value_and_slope(function, x, outer)
    with unsaturated():
        found = value_and_slope(function, x, outer)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-7)


def hinge(score: Tensor) -> Tensor:
    return HingeLoss()(GateTable(score, torch.full_like(score, 0.5), score), torch.ones(1))


@pytest.mark.parametrize("function", SIGMOIDS)
@pytest.mark.parametrize("logit", [-20.0, -80.0, -1e3, -1e6])
def test_the_hinge_pulls_at_a_logit_however_low_it_is(function: Callable[[Tensor], Tensor], logit: float) -> None:
    x = torch.tensor([[logit]], requires_grad=True)
    with unsaturated():
        loss = hinge(function(x))
    assert torch.autograd.grad(loss.sum(), x)[0].item() == pytest.approx(-1, rel=1e-4)


@pytest.mark.parametrize("function", SOFTMAXES)
@pytest.mark.parametrize("logit", [-20.0, -80.0, -1e3])
def test_the_hinge_pulls_at_both_logits_of_a_softmax(function: Callable[[Tensor], Tensor], logit: float) -> None:
    x = torch.tensor([[0.0, logit]], requires_grad=True)
    with unsaturated():
        loss = hinge(function(x)[:, 1:])
    assert torch.autograd.grad(loss.sum(), x)[0][0].tolist() == pytest.approx([1, -1], rel=1e-4)


def test_an_exit_that_is_all_too_sure_is_pulled_at() -> None:
    logits = torch.tensor([[500.0, 0.0, -3.0]], requires_grad=True)
    with unsaturated():
        loss = hinge(exit_score(logits, 0.5))
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert slope[0, 0] > 0
    assert bool((slope[0, 1:] < 0).all())


def test_without_it_they_are_lost() -> None:
    x = torch.tensor([[-1e3]], requires_grad=True)
    assert torch.autograd.grad(hinge(torch.sigmoid(x)).sum(), x)[0].item() == 0


def test_it_ends_with_its_block_and_works_under_autocast() -> None:
    with unsaturated(), torch.autocast("cpu", torch.bfloat16):
        x = torch.full((1, 4), -1e3, requires_grad=True)
        loss = hinge(torch.sigmoid(functional.linear(x, torch.ones(1, 4))).float())
    assert torch.autograd.grad(loss.sum(), x)[0].tolist() == [[-1] * 4]
    assert type(torch.sigmoid(x).grad_fn).__name__ == "SigmoidBackward0"
