"""Each gate loss against its formula in numpy and against finite differences, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatewatt.attacks import CheapestGateLoss, ComplexityLoss, FinishedLoss, GateLoss, HingeLoss, Joint, PowerLoss, UniformExitsLoss
from gatewatt.gating import DynamicOutput, GateTable

Column = NDArray[np.float64]


def table(images: int = 6, units: int = 9, seed: int = 0) -> GateTable:
    """Random scores and thresholds in float64, none of them near a tie, where the losses have a kink."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(images, units, generator=generator, dtype=torch.float64)
    threshold = 0.2 + 0.6 * torch.rand(images, units, generator=generator, dtype=torch.float64)
    score = torch.where((score - threshold).abs() < 0.02, (score + 0.1).clamp(max=1), score)
    return GateTable(score, threshold, (score >= threshold).double())


def weights(units: int = 9) -> Tensor:
    drawn = torch.rand(units, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return drawn / drawn.mean()


def power_by_formula(lam: Column, score: Column, tau: Column, alpha: float) -> list[float]:
    return [-sum(lam[i] * min(score[b, i], tau[b, i]) ** alpha for i in range(len(lam))) for b in range(len(score))]


ALPHAS, LEVELS = [1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 6.0, 7.0], [0.31, 0.97, 0.45, 0.5, 0.62, 0.71, 0.83, 0.11, 1.0]


def powers_by_formula(lam: Column, score: Column, tau: Column) -> list[float]:
    return [-sum(lam[i] * min(score[b, i], tau[b, i]) ** ALPHAS[i] for i in range(len(lam))) for b in range(len(score))]


def levels_by_formula(lam: Column, score: Column, tau: Column) -> list[float]:
    return [-sum(lam[i] * min(score[b, i], LEVELS[i]) for i in range(len(lam))) for b in range(len(score))]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def hinge_by_formula(lam: Column, score: Column, tau: Column, margin: float) -> list[float]:
    return [sum(lam[i] * max(logit(tau[b, i]) + margin - logit(score[b, i]), 0) for i in range(len(lam))) for b in range(len(score))]


def smooth_by_formula(lam: Column, score: Column, tau: Column, margin: float, t: float) -> list[float]:
    short = [[logit(tau[b, i]) + margin - logit(score[b, i]) for i in range(len(lam))] for b in range(len(score))]
    return [sum(lam[i] * t * math.log(1 + math.exp(row[i] / t)) for i in range(len(lam))) for row in short]


def cheapest_by_formula(lam: Column, score: Column, tau: Column, scale: float) -> list[float]:
    distances = [[max(logit(tau[b, i]) - logit(score[b, i]), 0) for i in range(len(lam))] for b in range(len(score))]
    return [sum(lam[i] * math.log(1 + row[i] / scale) for i in range(len(lam))) for row in distances]


FORMULAS = [
    (ComplexityLoss(), lambda lam, score, tau: power_by_formula(lam, score, tau, 1)),
    (PowerLoss(), lambda lam, score, tau: power_by_formula(lam, score, tau, 4)),
    (PowerLoss(2.5), lambda lam, score, tau: power_by_formula(lam, score, tau, 2.5)),
    (FinishedLoss(), lambda lam, score, tau: [-sum(lam[i] * max(score[b, i], tau[b, i]) for i in range(len(lam))) for b in range(len(score))]),
    (PowerLoss(ALPHAS), powers_by_formula),
    (ComplexityLoss(LEVELS), levels_by_formula),
    (HingeLoss(), lambda lam, score, tau: hinge_by_formula(lam, score, tau, 0.1)),
    (HingeLoss(0.0), lambda lam, score, tau: hinge_by_formula(lam, score, tau, 0.0)),
    (HingeLoss(0.5, 1.0), lambda lam, score, tau: smooth_by_formula(lam, score, tau, 0.5, 1.0)),
    (HingeLoss(0.2, 0.3), lambda lam, score, tau: smooth_by_formula(lam, score, tau, 0.2, 0.3)),
    (CheapestGateLoss(), lambda lam, score, tau: cheapest_by_formula(lam, score, tau, 0.01)),
    (CheapestGateLoss(2.0), lambda lam, score, tau: cheapest_by_formula(lam, score, tau, 2.0)),
]
NAMES = [
    "Eq. 6",
    "Eq. 7",
    "Eq. 7, alpha 2.5",
    "Eq. 8",
    "alphas",
    "levels",
    "hinge",
    "hinge, no margin",
    "hinge, smooth",
    "hinge, a little smooth",
    "cheapest",
    "cheapest, wide",
]


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=NAMES)
def test_the_loss_is_its_formula(loss: GateLoss, formula: object) -> None:
    assert callable(formula)
    gates = table()
    expected = formula(weights().numpy(), gates.score.numpy(), gates.threshold.numpy())
    found = loss(gates, weights())
    assert found.shape == (6,)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("loss", "formula"), FORMULAS, ids=NAMES)
def test_the_gradient_is_that_of_finite_differences(loss: GateLoss, formula: object) -> None:
    assert callable(formula)
    gates, lam, step = table(), weights().numpy(), 1e-6
    score = gates.score.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(gates._replace(score=score), weights()).sum(), score)
    values, tau = gates.score.numpy(), gates.threshold.numpy()
    expected = np.zeros_like(values)
    for image, unit in np.ndindex(values.shape):
        above, below = values.copy(), values.copy()
        above[image, unit] += step
        below[image, unit] -= step
        expected[image, unit] = (formula(lam, above, tau)[image] - formula(lam, below, tau)[image]) / (2 * step)
    # The tolerance is that of the differences: values near 1000 times 1e-16, over a step of 1e-6.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_the_power_loss_with_alpha_1_is_eq_6() -> None:
    gates = table(50, 20)
    lam, score = weights(20), gates.score.clone().requires_grad_()
    losses = [loss(gates._replace(score=score), lam) for loss in (PowerLoss(1.0), ComplexityLoss())]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), score)[0] for loss in losses))


def test_joint_with_the_complexity_loss_is_eq_5() -> None:
    # Sixteenths and quarters: every product and sum is exact, so the two forms must be the same number.
    generator = torch.Generator().manual_seed(2)
    score = torch.randint(0, 17, (40, 12), generator=generator).double() / 16
    tau, lam = torch.full_like(score, 0.5), torch.randint(1, 9, (12,), generator=generator).double() / 4
    asked: list[tuple[Tensor, bool]] = []

    def gradient(loss: Tensor, more: bool) -> Tensor:
        asked.append((loss, more))
        return loss

    Joint()(ComplexityLoss(), GateTable(score, tau, (score >= tau).double()), lam, gradient)
    ((loss, more),) = asked
    assert loss.tolist() == [-sum(lam[i].item() * (score[b, i].item() + 0.5) for i in range(12)) for b in range(40)]
    assert not more


def test_the_loss_on_closed_gates_does_not_see_how_open_an_open_gate_is() -> None:
    gates = table()
    wider = gates._replace(score=torch.where(gates.score > gates.threshold, torch.ones_like(gates.score), gates.score))
    for loss in (ComplexityLoss(), PowerLoss()):
        assert torch.equal(loss(gates, weights()), loss(wider, weights()))
    narrower = gates._replace(score=torch.where(gates.score < gates.threshold, torch.zeros_like(gates.score), gates.score))
    assert torch.equal(FinishedLoss()(gates, weights()), FinishedLoss()(narrower, weights()))


def test_the_power_prefers_what_is_nearly_open() -> None:
    score = torch.tensor([[0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(PowerLoss(4.0)(GateTable(score, torch.full((1, 2), 0.5), torch.zeros(1, 2)), torch.ones(2)).sum(), score)
    assert slope.tolist()[0] == pytest.approx([-4 * 0.1**3, -4 * 0.4**3])


@pytest.mark.parametrize("alpha", [0.5, 0.0, -1.0, float("nan"), float("inf")])
def test_a_power_below_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be .*at least 1 .*\(Eq. 7\), got"):
        PowerLoss(alpha)


# ---- one value per unit ----


@pytest.mark.parametrize("wrong", [[0.5] * 8, [0.5] * 10, []])
def test_one_value_per_unit_or_none(wrong: list[float]) -> None:
    for loss, argument in ((PowerLoss([1 + value for value in wrong]), "alpha"), (ComplexityLoss(wrong), "thresholds")):
        with pytest.raises(ValueError, match=f"{argument} holds {len(wrong)} values for a network of 9 units; give one per unit"):
            loss(table(), weights())


def test_equal_values_per_unit_are_one_value() -> None:
    assert torch.equal(PowerLoss([2.5] * 9)(table(), weights()), PowerLoss(2.5)(table(), weights()))
    half = table()._replace(threshold=torch.full((6, 9), 0.5, dtype=torch.float64))
    assert torch.equal(ComplexityLoss([0.5] * 9)(half, weights()), ComplexityLoss()(half, weights()))


@pytest.mark.parametrize("level", [0.0, -0.1, 1.1, float("nan")])
def test_a_level_that_no_score_can_pass_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match=r"thresholds must be in \(0, 1\], one per unit, got 0.5, "):
        ComplexityLoss([0.5, level])


@pytest.mark.parametrize("alpha", [0.5, float("nan")])
def test_a_power_below_1_is_refused_wherever_it_stands(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be .*at least 1 .*\(Eq. 7\), got"):
        PowerLoss([4.0, alpha])


# ---- losses in logits ----


@pytest.mark.parametrize("distance", [-0.1, float("nan"), float("inf")])
def test_margin_and_scale_are_distances(distance: float) -> None:
    for values in ((distance, 0.0), (0.5, distance)):
        with pytest.raises(ValueError, match="margin and temperature must be finite and at least 0, got"):
            HingeLoss(*values)
    with pytest.raises(ValueError, match="scale must be finite and positive, a distance in logits, got"):
        CheapestGateLoss(distance)


def test_the_hinge_sees_a_firmly_closed_gate_and_the_power_loss_does_not() -> None:
    logits = torch.tensor([[-60.0, -30.0, -10.0, -1.0]], requires_grad=True)
    slopes = []
    for loss in (HingeLoss(), PowerLoss()):
        gates = GateTable(torch.sigmoid(logits), torch.full((1, 4), 0.5), torch.zeros(1, 4))
        slopes.append(torch.autograd.grad(loss(gates, torch.ones(4)).sum(), logits)[0][0].tolist())
    assert slopes[0] == pytest.approx([-1, -1, -1, -1], rel=1e-3)
    assert slopes[1][:2] == [0, 0]
    assert -1e-15 < slopes[1][2] < 0


@pytest.mark.parametrize("loss", [HingeLoss(), CheapestGateLoss()])
@pytest.mark.parametrize("score", [0.0, 1e-45, 1e-30, 1.0])
def test_losses_in_logits_are_finite_at_every_score(loss: GateLoss, score: float) -> None:
    scores = torch.tensor([[score, 0.4]], requires_grad=True)
    value = loss(GateTable(scores, torch.full((1, 2), 0.5), torch.zeros(1, 2)), torch.ones(2))
    (slope,) = torch.autograd.grad(value.sum(), scores)
    assert bool(torch.isfinite(value).all() and torch.isfinite(slope).all())


def test_the_nearest_gate_is_pushed_most_and_open_ones_not_at_all() -> None:
    logits = torch.tensor([[-3.0, -0.7, -0.1, 0.001, 2.0]], dtype=torch.float64, requires_grad=True)
    gates = GateTable(torch.sigmoid(logits), torch.full((1, 5), 0.5, dtype=torch.float64), torch.zeros(1, 5))
    lam = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(CheapestGateLoss(0.01)(gates, lam).sum(), logits)
    assert slope[0].tolist() == pytest.approx([-1 / 3.01, -2 / 0.71, -1 / 0.11, 0, 0])


@pytest.mark.parametrize("loss", [HingeLoss(0.0), CheapestGateLoss()])
def test_with_every_gate_open_nothing_is_left_to_do(loss: GateLoss) -> None:
    gates = table()._replace(score=torch.full((6, 9), 0.99, dtype=torch.float64))
    assert loss(gates, weights()).tolist() == [0] * 6


# ---- exits ----


def exits_by_formula(exits: Column) -> list[float]:
    """Sum over all exits but the last of the cross entropy between the uniform distribution and the softmax."""
    found = []
    for image in exits:
        total = 0.0
        for logits in image[:-1]:
            partition = sum(math.exp(value) for value in logits)
            total -= sum(math.log(math.exp(value) / partition) for value in logits) / len(logits)
        found.append(total)
    return found


def test_the_loss_of_the_exits_is_its_formula_and_its_gradient_that_of_finite_differences() -> None:
    exits = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    found = UniformExitsLoss().of(DynamicOutput(exits[:, -1], {}, exits), table(), weights())
    assert found.tolist() == pytest.approx(exits_by_formula(exits.detach().numpy()), rel=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), exits)
    values, step = exits.detach().numpy(), 1e-6
    for place in np.ndindex(values.shape):
        above, below = values.copy(), values.copy()
        above[place] += step
        below[place] -= step
        difference = (exits_by_formula(above)[place[0]] - exits_by_formula(below)[place[0]]) / (2 * step)
        assert slope[place].item() == pytest.approx(difference, abs=1e-8)
    assert not slope[:, -1].any()


def test_undecided_exits_are_the_least_loss() -> None:
    undecided = UniformExitsLoss().of(DynamicOutput(torch.zeros(1, 5), {}, torch.zeros(1, 4, 5)), table(), weights())
    assert undecided.item() == pytest.approx(3 * math.log(5))


def test_a_network_without_exits_is_refused() -> None:
    with pytest.raises(ValueError, match="DeepSloth attacks early exits, and this network returns none; use target='halting' or an attack on gates"):
        UniformExitsLoss().of(DynamicOutput(torch.zeros(1, 5), {}), table(), weights())


@pytest.mark.parametrize("loss", [ComplexityLoss(), PowerLoss(), HingeLoss(), CheapestGateLoss()])
def test_a_loss_over_gates_is_a_loss_over_outputs_that_hold_them(loss: GateLoss) -> None:
    assert torch.equal(loss.of(DynamicOutput(torch.zeros(6, 2), {}), table(), weights()), loss(table(), weights()))
