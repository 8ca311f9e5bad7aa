"""From a score to a decision, in value and in gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatewatt.gating import DECISIONS, decision_named, forced, hard, sampled, straight_through
from gatewatt.networks import SkipNet

HALF = torch.tensor(0.5)
unit_floats = st.floats(0, 1, width=32)


@given(st.lists(unit_floats, min_size=1, max_size=8), unit_floats)
def test_hard_and_straight_through_decide_exactly_zero_or_one(scores: list[float], threshold: float) -> None:
    expected = [[float(score >= threshold) for score in scores]]
    for decide in (hard, straight_through):
        assert decide("gate", torch.tensor([scores]), torch.tensor(threshold), training=True).tolist() == expected


@pytest.mark.parametrize("training", [True, False])
def test_straight_through_has_the_gradient_of_the_score(training: bool) -> None:
    score = torch.rand(5, 3, requires_grad=True)
    weights = torch.randn(5, 3)
    (weights * straight_through("gate", score, HALF, training=training)).sum().backward()
    assert score.grad is not None
    assert torch.equal(score.grad, weights)


@pytest.mark.parametrize("decide", [hard, sampled])
@pytest.mark.parametrize("training", [True, False])
def test_hard_and_sampled_decisions_have_no_gradient(decide: object, training: bool) -> None:
    score = torch.rand(4, 1, requires_grad=True)
    assert callable(decide)
    assert not decide("gate", score, HALF, training=training).requires_grad


def test_sampled_draws_a_bernoulli_in_training() -> None:
    probabilities = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0])
    draws = sampled("gate", probabilities.expand(20_000, 5), HALF, training=True)
    assert draws.unique().tolist() == [0.0, 1.0]
    # Five standard errors of a Bernoulli mean; the two certain ones must be exact.
    error = 5 * (probabilities * (1 - probabilities) / len(draws)).sqrt()
    assert bool(((draws.mean(0) - probabilities).abs() <= error).all())


def test_sampled_is_hard_in_evaluation() -> None:
    score = torch.rand(100, 2)
    before = torch.get_rng_state()
    assert torch.equal(sampled("gate", score, HALF, training=False), hard("gate", score, HALF, training=False))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_decision_is_found_by_its_name() -> None:
    assert all(decision_named(name) is decision for name, decision in DECISIONS.items())
    with pytest.raises(ValueError, match="one of hard, straight_through, sampled, got 'soft'"):
        decision_named("soft")


def test_forced_decisions_are_executed_and_the_network_gets_its_own_back(network: SkipNet, images: Tensor) -> None:
    own, expected = network.decision, {"block1": torch.tensor([[1.0], [0.0]]), "block2": torch.tensor([[0.0], [1.0]])}
    with forced(network, expected):
        gates = network(images[:2]).gates
    assert all(torch.equal(gates[name].executed, pattern) for name, pattern in expected.items())
    assert network.decision is own
    with pytest.raises(RuntimeError, match="boom"), forced(network, expected):
        raise RuntimeError("boom")
    assert network.decision is own


def test_a_forced_pattern_must_name_and_fit_every_gate(network: SkipNet, images: Tensor) -> None:
    with (
        forced(network, {"block1": torch.ones(2, 1)}),
        pytest.raises(ValueError, match="no forced decision for gate 'block2'; the pattern names block1"),
    ):
        network(images[:2])
    with forced(network, {"block1": torch.ones(3, 1)}), pytest.raises(ValueError, match=r"gate 'block1' has shape \(3, 1\), the gate \(2, 1\)"):
        network(images[:2])
