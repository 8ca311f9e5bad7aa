"""The score behind an exit against the native rule, higher precision and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gatewatt.gating import exit_score

rows = st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=6)


@given(rows, st.sampled_from([0.1, 0.25, 0.5, 0.8, 0.95, 0.999]))
def test_the_image_goes_on_iff_its_confidence_is_at_most_q(row: list[float], q: float) -> None:
    confidence = torch.tensor([row], dtype=torch.float64).softmax(1).max().item()
    assume(abs(confidence - q) > 1e-6)
    score = exit_score(torch.tensor([row]), q)
    assert score.shape == (1, 1)
    assert 0 <= score.item() <= 1
    assert (score.item() >= 0.5) == (confidence <= q)


def test_at_one_half_the_threshold_is_a_confidence_of_one_half() -> None:
    # d / (d + 1 - q) with d = 1/2: two equal classes; at the tie the stage runs.
    assert exit_score(torch.zeros(3, 2), 0.5).tolist() == [[0.5]] * 3
    score = exit_score(torch.tensor([[1.0, 0.0, -2.0]]), 0.7)
    doubt = 1 - torch.tensor([1.0, 0.0, -2.0]).softmax(0).max().item()
    assert score.item() == pytest.approx(doubt / (doubt + 0.3), rel=1e-6)


def test_q_may_be_a_tensor() -> None:
    logits = torch.randn(4, 5)
    torch.testing.assert_close(exit_score(logits, torch.tensor([0.9])), exit_score(logits, 0.9))


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0])
def test_a_certain_exit_keeps_an_accurate_doubt_and_gradient(margin: float) -> None:
    single = torch.tensor([[margin, 0.0, -1.0]], requires_grad=True)
    double = single.detach().double().requires_grad_()
    values = [exit_score(logits, 0.5) for logits in (single, double)]
    gradients = [torch.autograd.grad(value.sum(), logits)[0] for value, logits in zip(values, (single, double), strict=True)]
    # 1 - max softmax is exactly 0 in float32 from a margin of 17 on.
    assert values[0].item() > 0
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
    assert gradients[0].abs().min() > 0
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=1e-4, atol=0)


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda values: exit_score(values, 0.8), (logits,))


def test_the_score_is_float32_or_better() -> None:
    logits = torch.randn(2, 10)
    assert exit_score(logits.bfloat16(), 0.5).dtype == torch.float32
    assert exit_score(logits.double(), 0.5).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exit_score(logits, 0.5), exit_score(logits.clone(), 0.5))
        assert exit_score(logits, 0.5).dtype == torch.float32


def test_a_nan_stays_a_nan() -> None:
    assert bool(exit_score(torch.tensor([[0.0, torch.nan]]), 0.5).isnan())
