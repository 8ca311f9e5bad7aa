"""The algebra of halting, unit by unit, against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gatewatt.gating import HaltingState, accumulate, advance, go_on_score, start_halting

LAYERS, EPS = 6, 0.01


class Run:
    """Scores h (L, B, U) of the first L layers; the last layer has none. ``decided`` (L, B, U) overrides the scores' own decisions."""

    def __init__(self, halting: Tensor, decided: Tensor | None = None) -> None:
        state = start_halting(halting[0])
        score = state.running
        weights, scores, executed = [], [], [state.running]
        for layer, h in enumerate(halting):
            cumulative, score = accumulate(state, h), go_on_score(state, torch.logit(h), score, EPS)
            scores.append(score)
            go_on = (score >= 0.5).to(h) if decided is None else decided[layer]
            weight, state = advance(state, h, cumulative, go_on)
            weights.append(weight)
            executed.append(state.running)
        none = torch.zeros_like(halting[0])
        weight, state = advance(state, none, state.cumulative, none)
        self.weights, self.scores, self.executed = torch.stack([*weights, weight]), torch.stack(scores), torch.stack(executed)
        self.ponder, self.running = state.ponder, state.running


def by_definition(halting: list[float]) -> tuple[int, list[float]]:
    """N and the weights of one unit: the first layer whose sum reaches 1 - eps, else the last of all."""
    total = 0.0
    for layer, h in enumerate(halting, start=1):
        if total + h >= 1 - EPS:
            return layer, [*halting[: layer - 1], 1 - total, *[0.0] * (len(halting) + 1 - layer)]
        total += h
    return len(halting) + 1, [*halting, 1 - total]


def scores(seed: int = 0, images: int = 3, units: int = 40) -> Tensor:
    """Halting scores at many levels, so that units stop at every layer."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.logspace(-2, 0, units, dtype=torch.float64)
    return torch.rand(LAYERS - 1, images, units, generator=generator, dtype=torch.float64) * level


def test_every_unit_halts_where_its_sum_reaches_the_bound() -> None:
    halting = scores()
    run = Run(halting)
    numbers = run.executed.sum(0)
    assert set(numbers.flatten().tolist()) == set(range(2, LAYERS + 1)), "not every number of layers is met"
    for image in range(halting.shape[1]):
        for unit in range(halting.shape[2]):
            number, weights = by_definition(halting[:, image, unit].tolist())
            assert run.executed[:, image, unit].tolist() == [1.0] * number + [0.0] * (LAYERS - number)
            assert run.weights[:, image, unit].tolist() == pytest.approx(weights)
            assert run.ponder[image, unit].item() == pytest.approx(number + weights[number - 1])
    assert not bool(run.running.any())


def test_weights_add_up_to_one_and_the_cost_is_bounded() -> None:
    run = Run(scores(1))
    torch.testing.assert_close(run.weights.sum(0), torch.ones_like(run.ponder))
    assert bool((run.weights >= 0).all())
    assert run.ponder.min() >= 2
    assert run.ponder.max() <= LAYERS + 1


def test_a_unit_that_halts_at_once_costs_two_and_one_that_never_does_costs_all() -> None:
    once, never = Run(torch.ones(5, 1, 1)), Run(torch.zeros(5, 1, 1))
    assert (once.ponder.item(), never.ponder.item()) == (2.0, 7.0)
    assert once.weights.flatten().tolist() == [1, 0, 0, 0, 0, 0]
    assert never.weights.flatten().tolist() == [0, 0, 0, 0, 0, 1]


def test_the_slope_of_the_cost_is_minus_one_before_the_last_layer_and_zero_from_there() -> None:
    halting = scores(2).requires_grad_()
    run = Run(halting)
    (slope,) = torch.autograd.grad(run.ponder.sum(), halting)
    number = run.executed.sum(0)
    layer = torch.arange(1, LAYERS)[:, None, None]
    assert torch.equal(slope, -(layer < number).to(slope))


def test_weights_have_the_slopes_of_their_formula() -> None:
    halting = scores(3, 1, 9)
    decided = Run(halting).executed[1:]
    assert torch.autograd.gradcheck(lambda h: Run(h, decided).weights, halting.requires_grad_())


def test_no_gradient_runs_through_the_decision() -> None:
    halting = scores(4).requires_grad_()
    decided = Run(halting.detach()).executed[1:].requires_grad_()
    run = Run(halting, decided)
    assert torch.autograd.grad(run.weights.square().sum() + run.ponder.sum(), decided, allow_unused=True) == (None,)


def test_forced_decisions_are_obeyed_but_cannot_wake_what_stopped() -> None:
    decided = (torch.rand(LAYERS - 1, 3, 40, generator=torch.Generator().manual_seed(5)) < 0.7).double()
    run = Run(scores(5), decided)
    assert torch.equal(run.executed[1:], decided.cumprod(0))
    torch.testing.assert_close(run.weights.sum(0), torch.ones_like(run.ponder))
    assert bool((run.weights[1:] == 0)[run.executed[1:] == 0].all())
    assert bool(torch.isfinite(run.ponder).all())


def test_what_stopped_keeps_its_score_so_that_no_gate_asks_for_more_than_ran() -> None:
    run = Run(scores(6))
    stopped = run.executed[1:-1] == 0
    assert bool(stopped.any())
    assert torch.equal(run.scores[1:][stopped], run.scores[:-1][stopped])
    assert torch.equal(run.scores >= 0.5, run.executed[1:] == 1)


def running_at(cumulative: Tensor) -> HaltingState:
    """Units that run, with these sums of scores."""
    return HaltingState(torch.ones_like(cumulative), cumulative, torch.zeros_like(cumulative))


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_a_score_is_the_native_test_on_a_scale_from_zero_to_one(eps: float) -> None:
    before, logits = torch.rand(10_000, dtype=torch.float64) * (1 - eps), 8 * torch.randn(10_000, dtype=torch.float64)
    score = go_on_score(running_at(before), logits.requires_grad_(), torch.ones(()), eps)
    assert torch.equal(score >= 0.5, before + torch.sigmoid(logits) <= 1 - eps)
    assert score.min() > 0
    assert score.max() < 1
    (slope,) = torch.autograd.grad(score.sum(), logits)
    assert slope.max() < 0
    assert torch.autograd.gradcheck(lambda a: go_on_score(running_at(before[:50]), a, torch.ones(()), eps), logits[:50].detach().requires_grad_())


def test_a_unit_that_halts_firmly_has_a_slope_though_its_halting_score_is_rounded_to_one() -> None:
    logits = torch.tensor([[5.0, 12.0, 20.0, 60.0]], requires_grad=True)
    assert (torch.sigmoid(logits)[0] == 1).tolist() == [False, False, True, True]
    score = go_on_score(running_at(torch.zeros(1, 4)), logits, torch.ones(1, 4))
    assert bool((score < 0.5).all())
    # What a loss in logits follows: the further from opening, the lower, at slope 1.
    (slope,) = torch.autograd.grad(torch.logit(score).sum(), logits)
    assert slope[0].tolist() == pytest.approx([-1.0] * 4, abs=0.01)
