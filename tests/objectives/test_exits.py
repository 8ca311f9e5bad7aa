"""Losses over exits against loops and a schedule written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tests.toys import gate
from torch import Tensor

from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicOutput
from gatewatt.objectives import Objective
from gatewatt.objectives.exits import InternalClassifiers, SummedExits, WeightedExits

LEDGER = FlopsLedger({"a": 1.0}, (Charge("a", ("a",)),), 2.0, 1.0, 0.0, (8, 8), {"a": 1})
LABELS = torch.tensor([2, 0, 1])
MAXIMA = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)


def output(exits: int) -> DynamicOutput:
    """Logits of ``exits`` exits for three images and four classes; the answer given is none of the losses' business."""
    generator = torch.Generator().manual_seed(exits)
    stacked = torch.randn(3, exits, 4, generator=generator).requires_grad_()
    return DynamicOutput(torch.full((3, 4), torch.nan), {"a": gate([[1.0]] * 3)}, stacked)


def cross_entropy(logits: Tensor, smoothing: float = 0.0) -> float:
    """Mean over images of -sum of target times log softmax, by loops."""
    total = 0.0
    for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True):
        logarithm = math.log(sum(math.exp(value) for value in row))
        for index, value in enumerate(row):
            target = smoothing / len(row) + (1 - smoothing) * (index == label)
            total += target * (logarithm - value)
    return total / len(LABELS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_every_exit_has_its_term(smoothing: float) -> None:
    batch = output(4)
    assert batch.exits is not None
    by_hand = [cross_entropy(batch.exits[:, index], smoothing) for index in range(4)]
    weighted = WeightedExits(label_smoothing=smoothing)
    weighted.progress = 0.5
    # Epoch 51 of 100.
    weights = [0.01 + 0.51 * maximum for maximum in MAXIMA[:3]]
    expected: dict[Objective, dict[str, float]] = {
        SummedExits(smoothing): {"exit1": by_hand[0], "exit2": by_hand[1], "exit3": by_hand[2], "cross_entropy": by_hand[3]},
        InternalClassifiers(smoothing): {"exit1": by_hand[0], "exit2": by_hand[1], "exit3": by_hand[2]},
        weighted: {**{f"exit{i + 1}": weights[i] * by_hand[i] for i in range(3)}, "cross_entropy": by_hand[3]},
    }
    for objective, terms in expected.items():
        found = {name: term.item() for name, term in objective(batch, LABELS, LEDGER).items()}
        assert list(found) == list(terms)
        assert found == pytest.approx(terms, rel=1e-5)


def test_the_weights_grow_once_per_epoch_up_to_their_maxima() -> None:
    objective, steps = WeightedExits(), 7
    seen = []
    for step in range(100 * steps):
        objective.progress = step / (100 * steps)
        seen.append(objective.weights(6))
    for epoch in range(1, 101):
        expected = [min(0.01 + epoch * maximum / 100, maximum) for maximum in MAXIMA]
        for step in range((epoch - 1) * steps, epoch * steps):
            assert seen[step] == pytest.approx(expected)
    assert seen[0] == pytest.approx([0.0115, 0.013, 0.0145, 0.016, 0.0175, 0.019])
    assert seen[-1] == pytest.approx(MAXIMA)


def test_a_shorter_run_may_have_its_own_epochs() -> None:
    objective = WeightedExits((0.5, 1.0), epochs=4)
    weights = []
    for step in range(8):
        objective.progress = step / 8
        weights.append(objective.weights(2)[1])
    assert weights == pytest.approx([0.26, 0.26, 0.51, 0.51, 0.76, 0.76, 1.0, 1.0])


def test_a_network_of_five_takes_the_first_five_maxima() -> None:
    objective = WeightedExits()
    objective.progress = 0.995
    assert objective.weights(5) == pytest.approx(MAXIMA[:5])
    assert list(objective(output(6), LABELS, LEDGER)) == ["exit1", "exit2", "exit3", "exit4", "exit5", "cross_entropy"]
    with pytest.raises(ValueError, match="has 7 internal classifiers and maxima only 6 entries"):
        objective(output(8), LABELS, LEDGER)


def test_internal_classifiers_leave_the_final_one_alone() -> None:
    batch = output(3)
    assert batch.exits is not None
    terms = InternalClassifiers()(batch, LABELS, LEDGER)
    (slope,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), batch.exits)
    assert slope[:, :2].abs().min() > 0
    assert slope[:, 2].abs().max() == 0


def test_half_precision_logits_give_a_float32_loss() -> None:
    batch = output(3)
    assert batch.exits is not None
    half = batch._replace(exits=batch.exits.bfloat16())
    assert all(term.dtype == torch.float32 for term in SummedExits()(half, LABELS, LEDGER).values())


@pytest.mark.parametrize("objective", [WeightedExits(), InternalClassifiers(), SummedExits()])
@pytest.mark.parametrize("exits", [None, torch.zeros(3, 1, 4)])
def test_a_network_without_internal_classifiers_has_no_such_loss(objective: Objective, exits: Tensor | None) -> None:
    with pytest.raises(ValueError, match="no internal classifiers to train"):
        objective(output(2)._replace(exits=exits), LABELS, LEDGER)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedExits(()), r"maxima must be finite and at least 0, one per internal classifier, got \(\)"),
        (lambda: WeightedExits((0.1, -0.1)), r"got \(0.1, -0.1\)"),
        (lambda: WeightedExits((math.inf,)), r"got \(inf,\)"),
        (lambda: WeightedExits((math.nan,)), r"got \(nan,\)"),
        (lambda: WeightedExits(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: WeightedExits(label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: InternalClassifiers(-0.1), "label_smoothing"),
        (lambda: SummedExits(1.5), "label_smoothing"),
    ],
)
def test_a_value_out_of_range_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
