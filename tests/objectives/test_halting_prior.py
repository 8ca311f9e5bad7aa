"""A-ViT's loss against the published target and torch's own divergence."""

from __future__ import annotations

import math

import pytest
import torch
from tests.toys import gate
from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicOutput
from gatewatt.objectives.halting_prior import HaltingPrior, layer_prior

LEDGER = FlopsLedger({"a": 6.0}, (Charge("a", ("a",)),), dense=10.0, fixed=4.0, overhead=0.0, resolution=(8, 8), units={"a": 1})
LABELS = torch.tensor([2, 0, 1])
RELEASED = [0, 0, 0, 0, 0.0004, 0.0145, 0.1761, 0.7890, 1.3009, 0.7890, 0.1761, 0.0145]
LIVE = torch.tensor([[16.0] * 6 + [7.0] * 6, [16.0] * 12, [16.0] * 3 + [0.0] * 9])


def output(halting: Tensor, live: Tensor = LIVE) -> DynamicOutput:
    """Three images that pondered 3, 5 and 8.5 layers."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    aux = {"ponder": torch.tensor([3.0, 5.0, 8.5], requires_grad=True), "halting": halting, "live": live}
    return DynamicOutput(logits, {"a": gate([[1.0], [0.0], [1.0]])}, aux=aux)


def halting_scores() -> Tensor:
    return torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) * (LIVE > 0)


def layer_means(halting: Tensor) -> list[float]:
    """Over all live tokens of the batch, by hand."""
    means = []
    for layer in range(12):
        total = sum(halting[image, layer].item() * LIVE[image, layer].item() for image in range(3))
        means.append(total / sum(LIVE[image, layer].item() for image in range(3)))
    return means


def test_the_released_target_is_as_published() -> None:
    target = layer_prior(12, 8, released=True)
    assert [round(value, 4) for value in target.tolist()] == RELEASED
    assert round(target.sum().item(), 2) == 3.26
    assert target[:8].sum().item() == pytest.approx(0.98)
    torch.testing.assert_close(layer_prior(12, 8), target / target.sum())


def test_terms_are_weighted_means() -> None:
    found = output(halting_scores())
    terms = HaltingPrior(0.5, 2.0, label_smoothing=0.1)(found, LABELS, LEDGER)
    assert list(terms) == ["cross_entropy", "ponder", "prior"]
    assert terms["cross_entropy"].item() == pytest.approx(functional.cross_entropy(found.logits, LABELS, label_smoothing=0.1).item())
    assert terms["ponder"].item() == pytest.approx(0.5 * 5.5)
    assert terms["prior"].item() == pytest.approx(2 * HaltingPrior().divergence(found.aux["halting"], found.aux["live"]).item())


def test_defaults_are_the_papers() -> None:
    objective = HaltingPrior()
    assert (objective.ponder, objective.prior, objective.spread, objective.released) == (5e-4, 1e-3, 1.0, False)
    # Layer 8 of 12.
    halting = halting_scores()
    assert torch.equal(objective.divergence(halting, LIVE), HaltingPrior(center=8.0).divergence(halting, LIVE))


def test_the_released_divergence_is_torchs_batchmean_on_a_vector() -> None:
    halting = halting_scores()
    means = torch.tensor(layer_means(halting))
    spread = (means / means.sum()).clamp(0.01, 0.99)
    expected = functional.kl_div(spread.log(), layer_prior(12, 8, released=True), reduction="batchmean")
    assert expected > 0
    torch.testing.assert_close(HaltingPrior(released=True).divergence(halting, LIVE), expected)


def test_the_mended_divergence_is_between_distributions() -> None:
    halting = halting_scores()
    means = layer_means(halting)
    clamped = [min(max(mean / sum(means), 0.01), 0.99) for mean in means]
    found = [value / sum(clamped) for value in clamped]
    target = layer_prior(12, 8).tolist()
    expected = sum(wanted * math.log(wanted / value) for wanted, value in zip(target, found, strict=True) if wanted > 0) / 12
    assert HaltingPrior().divergence(halting, LIVE).item() == pytest.approx(expected, rel=1e-4)


def test_the_divergence_vanishes_on_its_target_alone() -> None:
    # A target wide enough that nothing of it is clamped.
    objective = HaltingPrior(spread=4.0)
    target = layer_prior(12, 8, 4.0)
    assert bool((target > 0.01).all())
    for scale in (0.2, 0.9):
        assert objective.divergence((scale * target).expand(3, 12), torch.ones(3, 12)).item() == pytest.approx(0, abs=1e-7)
    assert objective.divergence(target.flip(0).expand(3, 12), torch.ones(3, 12)).item() > 0.01


def test_a_negative_divergence_is_left_out_of_the_released_loss() -> None:
    # A flat target of 100 layers adds up to 0.98 * 100 / 99, less than the spread does.
    layers, wide = 100, {"center": 99.0, "spread": 1e6}
    target, spread = layer_prior(layers, **wide, released=True), torch.full((layers,), 0.01)
    assert functional.kl_div(spread.log(), target, reduction="batchmean") < 0
    flat = torch.full((2, layers), 0.3)
    assert HaltingPrior(**wide, released=True).divergence(flat, torch.ones(2, layers)).item() == 0


@pytest.mark.parametrize("released", [False, True])
def test_images_without_live_tokens_count_for_nothing(released: bool) -> None:
    halting, objective = halting_scores(), HaltingPrior(released=released)
    anything = halting.clone()
    anything[2, 3:] = 0.77
    assert torch.equal(objective.divergence(halting, LIVE), objective.divergence(anything, LIVE))


def test_the_prior_draws_halting_towards_its_layer() -> None:
    halting = torch.full((3, 12), 0.3, requires_grad=True)
    loss = HaltingPrior()(output(halting, torch.ones(3, 12)), LABELS, LEDGER)["prior"]
    (gradient,) = torch.autograd.grad(loss, halting)
    assert bool((gradient[:, [7, 8, 9]] < 0).all())
    assert bool((gradient[:, [0, 1, 2, 3]] > 0).all())


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-33])
def test_scores_that_say_nothing_give_a_finite_loss(value: float, released: bool) -> None:
    halting = torch.full((3, 12), value, requires_grad=True)
    loss = HaltingPrior(released=released)(output(halting), LABELS, LEDGER)["prior"]
    assert bool(torch.isfinite(loss))
    (gradient,) = torch.autograd.grad(loss, halting)
    assert not bool(gradient.isnan().any())


def test_an_output_of_another_family_is_refused() -> None:
    bare = output(halting_scores())._replace(aux={"ponder": torch.zeros(3)})
    with pytest.raises(ValueError, match="lacks halting, live in aux; HaltingPrior trains A-ViT"):
        HaltingPrior()(bare, LABELS, LEDGER)


def test_the_center_must_be_a_layer_of_the_network() -> None:
    with pytest.raises(ValueError, match="at most 11 for this network, got 12"):
        HaltingPrior(center=12.0).divergence(halting_scores(), LIVE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ponder": -1.0}, "ponder and prior must be at least 0, got -1.0 and 0.001"),
        ({"prior": -1.0}, "ponder and prior"),
        ({"center": 0.0}, "center and spread must be positive, in layers, got 0.0 and 1.0"),
        ({"spread": 0.0}, "center and spread"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HaltingPrior(**arguments)  # type: ignore[arg-type]
