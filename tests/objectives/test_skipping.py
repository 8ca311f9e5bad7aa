"""Losses of skipping networks against loops and derivatives written by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import pvariance

import pytest
import torch
from tests.toys import gate
from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicOutput, Gate
from gatewatt.objectives import ComputeTarget, CrossEntropy, HybridReinforcement

LEDGER = FlopsLedger(
    prices={"a": 600.0, "b": 300.0},
    charges=(Charge("a", ("a",)), Charge("b", ("b",))),
    dense=1000.0,
    fixed=100.0,
    overhead=0.0,
    resolution=(8, 8),
    units={"a": 1, "b": 3},
)
LABELS = torch.tensor([2, 0])


@pytest.fixture
def output() -> DynamicOutput:
    """Two images: 100 + 600 + 100 and 100 + 0 + 200 MACs, so 0.55 of dense on average."""
    generator = torch.Generator().manual_seed(0)
    score = {"a": torch.tensor([[0.8], [0.3]]), "b": torch.tensor([[0.9, 0.2, 0.4], [0.6, 0.1, 0.7]])}
    gates = {"a": gate([[1.0], [0.0]], score["a"].requires_grad_()), "b": gate([[1.0, 0, 0], [1, 0, 1]], score["b"].requires_grad_())}
    return DynamicOutput(torch.randn(2, 4, generator=generator).requires_grad_(), gates)


def cross_entropy_by_hand(logits: Tensor, labels: Tensor) -> list[float]:
    rows = logits.tolist()
    return [math.log(sum(math.exp(value) for value in row)) - row[label] for row, label in zip(rows, labels.tolist(), strict=True)]


def test_cross_entropy_is_its_formula(output: DynamicOutput) -> None:
    terms = CrossEntropy()(output, LABELS, LEDGER)
    assert list(terms) == ["cross_entropy"]
    assert terms["cross_entropy"].item() == pytest.approx(sum(cross_entropy_by_hand(output.logits, LABELS)) / 2)
    smoothed = CrossEntropy(0.1)(output, LABELS, LEDGER)["cross_entropy"]
    wanted = torch.full((2, 4), 0.1 / 4) + 0.9 * functional.one_hot(LABELS, 4)
    assert smoothed.item() == pytest.approx(-(wanted * output.logits.log_softmax(1)).sum(1).mean().item())


# ---- an explicit target ----


@pytest.mark.parametrize("target", [0.3, 0.55, 0.9])
def test_the_compute_term_is_the_squared_distance_of_the_batch_from_its_target(target: float, output: DynamicOutput) -> None:
    terms = ComputeTarget(target, weight=7.0)(output, LABELS, LEDGER)
    assert list(terms) == ["cross_entropy", "compute"]
    assert terms["compute"].dtype == torch.float32
    assert terms["compute"].item() == pytest.approx(7 * (0.55 - target) ** 2)
    assert torch.equal(terms["cross_entropy"], CrossEntropy()(output, LABELS, LEDGER)["cross_entropy"])


@pytest.mark.parametrize(("target", "sign"), [(0.3, 1), (0.9, -1)])
def test_the_compute_term_pulls_towards_its_target(target: float, sign: int, output: DynamicOutput) -> None:
    terms = ComputeTarget(target, weight=7.0)(output, LABELS, LEDGER)
    slopes = torch.autograd.grad(terms["compute"], [g.score for g in output.gates.values()])
    # Descent lowers the scores above the target and raises them below it: 2 w (f - target) / dense / B times price / units.
    outer = 2 * 7 * (0.55 - target) / 1000 / 2
    assert math.copysign(1, outer) == sign
    assert slopes[0].flatten().tolist() == pytest.approx([outer * 600 / 1] * 2)
    assert slopes[1].flatten().tolist() == pytest.approx([outer * 300 / 3] * 6)


@pytest.mark.parametrize(
    ("progress", "bound"), [(0.0, 1.0), (0.25, 1.0), (0.375, 0.85), (0.5, 0.7), (0.99, 0.7)], ids=["start", "open", "falling", "down", "end"]
)
def test_the_bound_falls_from_open_gates_to_the_target(progress: float, bound: float, output: DynamicOutput) -> None:
    objective = ComputeTarget(0.7, weight=7.0, descent=(0.25, 0.5))
    objective.progress = progress
    assert objective(output, LABELS, LEDGER)["compute"].item() == pytest.approx(7 * (0.55 - bound) ** 2)


@pytest.mark.parametrize(("progress", "bound"), [(0.0, 1.0), (0.49, 1.0), (0.5, 0.7), (0.99, 0.7)])
def test_a_descent_that_takes_no_time_is_a_step(progress: float, bound: float) -> None:
    objective = ComputeTarget(0.7, descent=(0.5, 0.5))
    objective.progress = progress
    assert objective.bound() == bound


@pytest.mark.parametrize("descent", [(0.5, 0.25), (-0.1, 0.5), (0.5, 1.5)])
def test_a_descent_that_does_not_fit_the_run_is_refused(descent: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="descent must be two parts of the run"):
        ComputeTarget(descent=descent)


def test_at_its_target_the_compute_term_is_at_rest(output: DynamicOutput) -> None:
    term = ComputeTarget(0.55, weight=7.0)(output, LABELS, LEDGER)["compute"]
    (slope,) = torch.autograd.grad(term, output.gates["a"].score)
    assert term.item() == pytest.approx(0, abs=1e-12)
    assert slope.abs().max() < 1e-12


def test_the_target_binds_the_batch_and_not_the_image() -> None:
    # One image at full FLOPs and one at none, against both at the middle.
    apart = {"a": gate([[1.0], [0.0]]), "b": gate([[1.0] * 3, [0.0] * 3])}
    term = ComputeTarget(0.55)(DynamicOutput(torch.zeros(2, 4), apart), LABELS, LEDGER)["compute"]
    assert term.item() == pytest.approx(0, abs=1e-12)


def test_descending_the_compute_term_reaches_the_target() -> None:
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=20.0)
    objective, threshold = ComputeTarget(0.5, weight=10.0), torch.tensor(0.5)
    for _ in range(200):
        score = torch.sigmoid(logits)
        gates = {"a": Gate(score[:, :1], threshold, (score[:, :1] >= 0.5).float()), "b": Gate(score[:, 1:], threshold, (score[:, 1:] >= 0.5).float())}
        optimizer.zero_grad()
        objective(DynamicOutput(torch.zeros(64, 4), gates), torch.zeros(64, dtype=torch.long), LEDGER)["compute"].backward()
        optimizer.step()
    assert LEDGER(gates).mean().item() / 1000 == pytest.approx(0.5, abs=0.02)


def mean_variance_by_hand(output: DynamicOutput) -> float:
    """Population variance of each unit's scores over the batch, mean over units."""
    columns = [column for gate in output.gates.values() for column in zip(*gate.score.tolist(), strict=True)]
    return sum(pvariance(column) for column in columns) / len(columns)


def test_the_variance_floor_is_about_the_scores_over_the_batch(output: DynamicOutput) -> None:
    variance = mean_variance_by_hand(output)
    assert 0 < variance < 0.25
    assert ComputeTarget(diversity=3.0, spread=0.25)(output, LABELS, LEDGER)["diversity"].item() == pytest.approx(3 * (0.25 - variance))
    assert ComputeTarget(diversity=3.0, spread=variance / 2)(output, LABELS, LEDGER)["diversity"].item() == 0
    assert "diversity" not in ComputeTarget(0.5)(output, LABELS, LEDGER)


def test_below_its_floor_the_variance_is_pushed_up_even_where_all_decide_alike() -> None:
    scores = torch.tensor([[0.6], [0.8]], requires_grad=True)
    gates = {"a": Gate(scores, torch.tensor(0.5), torch.ones(2, 1))}
    ledger = FlopsLedger({"m": 1.0}, (Charge("m", ("a",)),), 1.0, 0.0, 0.0, (8, 8), {"a": 1})
    term = ComputeTarget(diversity=3.0, spread=0.25)(DynamicOutput(torch.zeros(2, 2), gates), torch.tensor([0, 1]), ledger)["diversity"]
    (slope,) = torch.autograd.grad(term, scores)
    # -w d/ds of ((s0 - s1) / 2)^2: the lower score is pushed down, the higher one up.
    assert slope.flatten().tolist() == pytest.approx([3 * 0.1, -3 * 0.1])


# ---- reinforcement ----


def policy_by_hand(output: DynamicOutput, alpha: float, baseline: bool) -> float:
    """Image by image and gate by gate; returns the unweighted policy loss."""
    losses = cross_entropy_by_hand(output.logits, LABELS)
    images, returns, logs = len(losses), [], []
    for image in range(images):
        actions = [action for g in output.gates.values() for action in g.executed[image].tolist()]
        scores = [score for g in output.gates.values() for score in g.score[image].tolist()]
        rewards = [alpha / len(actions) * (1 - action) for action in actions]
        returns.append([sum(rewards[i:]) - losses[image] for i in range(len(actions))])
        logs.append([math.log(score if action else 1 - score) for score, action in zip(scores, actions, strict=True)])
    total = 0.0
    for image in range(images):
        for i in range(len(returns[image])):
            level = sum(other[i] for other in returns) / images if baseline else 0.0
            total += (returns[image][i] - level) * -logs[image][i]
    return total / images


def sampled_against_the_scores(output: DynamicOutput) -> DynamicOutput:
    """Draws need not agree with ``score >= threshold``."""
    return output._replace(gates={name: replace(g, executed=1 - g.executed) for name, g in output.gates.items()})


@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.1, 2.0])
def test_the_policy_term_is_a_loop_over_images_and_gates(alpha: float, baseline: bool, output: DynamicOutput) -> None:
    for drawn in (output, sampled_against_the_scores(output)):
        terms = HybridReinforcement(alpha, 1.28, baseline=baseline)(drawn, LABELS, LEDGER)
        assert list(terms) == ["cross_entropy", "policy"]
        assert terms["policy"].item() == pytest.approx(1.28 * policy_by_hand(drawn, alpha, baseline), rel=1e-5)
        assert terms["cross_entropy"].item() == pytest.approx(sum(cross_entropy_by_hand(output.logits, LABELS)) / 2)


def test_returns_are_detached(output: DynamicOutput) -> None:
    policy = HybridReinforcement()(output, LABELS, LEDGER)["policy"]
    logits, first, second = torch.autograd.grad(policy, [output.logits, *(g.score for g in output.gates.values())], allow_unused=True)
    assert logits is None
    # d/dp of -R log p is -R / p for an open gate and R / (1 - p) for a closed one, over the number of images.
    loss = cross_entropy_by_hand(output.logits, LABELS)[0]
    rewards = [0.0, 0.0, 0.1 / 4, 0.1 / 4]
    returns = [sum(rewards[i:]) - loss for i in range(4)]
    expected = [-returns[0] / 0.8, -returns[1] / 0.9, returns[2] / 0.8, returns[3] / 0.6]
    assert [*first[0].tolist(), *second[0].tolist()] == pytest.approx([1.28 * value / 2 for value in expected], rel=1e-5)


def test_each_image_is_credited_with_its_own_return(output: DynamicOutput) -> None:
    terms = HybridReinforcement()(output, LABELS, LEDGER)
    before = torch.autograd.grad(terms["policy"], output.gates["b"].score)[0]
    worse = output._replace(logits=output.logits.detach() + torch.tensor([[0.0] * 4, [-9.0, 0, 0, 0]]))
    after = torch.autograd.grad(HybridReinforcement()(worse, LABELS, LEDGER)["policy"], output.gates["b"].score)[0]
    assert torch.equal(after[0], before[0])
    assert bool((after[1] != before[1]).all())


def test_a_certain_decision_has_a_finite_loss() -> None:
    certain = DynamicOutput(torch.zeros(2, 4), {"a": gate([[1.0], [0.0]], torch.tensor([[0.0], [1.0]]))})
    assert bool(torch.isfinite(HybridReinforcement()(certain, LABELS, LEDGER)["policy"]))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: CrossEntropy(-0.1), "label_smoothing"),
        (lambda: ComputeTarget(0.0), r"target must be in \(0, 1\], a fraction of the dense FLOPs, got 0.0"),
        (lambda: ComputeTarget(70), "target must be in .* got 70"),
        (lambda: ComputeTarget(0.5, -1.0), "weight and diversity must be at least 0, got -1.0 and 0.0"),
        (lambda: ComputeTarget(0.5, diversity=-1.0), "got 10.0 and -1.0"),
        (lambda: ComputeTarget(0.5, spread=0.3), r"spread must be in \[0, 0.25\], the variance of a score, got 0.3"),
        (lambda: ComputeTarget(label_smoothing=2.0), "label_smoothing"),
        (lambda: HybridReinforcement(-0.1), "alpha and policy_weight must be at least 0, got -0.1 and 1.28"),
        (lambda: HybridReinforcement(policy_weight=-1.0), "got 0.1 and -1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("objective", [ComputeTarget(), HybridReinforcement()])
def test_a_network_without_gates_has_no_such_loss(objective: ComputeTarget | HybridReinforcement) -> None:
    with pytest.raises(ValueError, match="returned no gates"):
        objective(DynamicOutput(torch.zeros(2, 4), {}), LABELS, LEDGER)
