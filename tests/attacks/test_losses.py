"""Each gate loss against its formula in numpy and against finite differences, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from gatewatt.attacks import ComplexityLoss, FinishedLoss, GateLoss, Joint, PowerLoss
from gatewatt.gating import GateTable

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


FORMULAS = [
    (ComplexityLoss(), lambda lam, score, tau: power_by_formula(lam, score, tau, 1)),
    (PowerLoss(), lambda lam, score, tau: power_by_formula(lam, score, tau, 4)),
    (PowerLoss(2.5), lambda lam, score, tau: power_by_formula(lam, score, tau, 2.5)),
    (FinishedLoss(), lambda lam, score, tau: [-sum(lam[i] * max(score[b, i], tau[b, i]) for i in range(len(lam))) for b in range(len(score))]),
]
NAMES = ["Eq. 6", "Eq. 7", "Eq. 7, alpha 2.5", "Eq. 8"]


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
    gates, lam, step = table(), weights().numpy(), 1e-5
    score = gates.score.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(gates._replace(score=score), weights()).sum(), score)
    values, tau = gates.score.numpy(), gates.threshold.numpy()
    expected = np.zeros_like(values)
    for image, unit in np.ndindex(values.shape):
        above, below = values.copy(), values.copy()
        above[image, unit] += step
        below[image, unit] -= step
        expected[image, unit] = (formula(lam, above, tau)[image] - formula(lam, below, tau)[image]) / (2 * step)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-8)


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
