"""ManiDP's loss against loops and derivatives written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tests.toys import gate
from torch import Tensor

from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import Charge, DynamicOutput
from gatewatt.networks.manidp import ManiDP
from gatewatt.objectives.manifold import ManifoldPruning, cosines, distance

LEDGER = FlopsLedger(prices={"a": 600.0}, charges=(Charge("a", ("a",)),), dense=700.0, fixed=100.0, overhead=0.0, resolution=(8, 8), units={"a": 3})
LABELS = torch.tensor([2, 0, 1])


def objective(reference: float | None = 3.0, **settings: float) -> ManifoldPruning:
    made = ManifoldPruning(**{"lasso": 0.3, "graph": 0.7, **settings})  # type: ignore[arg-type]
    made.reference = reference
    return made


@pytest.fixture
def output() -> DynamicOutput:
    """Three images, of which the first is easy; two mask blocks, of three and of two channels."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.tensor([[0.0, 0.2, 3.0, 0.1], [-1.0, 2.0, 0.4, 0.3], [0.1, 1.2, 0.0, 0.6]])
    aux = {}
    for name, channels in (("a", 3), ("b", 2)):
        aux[f"response/{name}"] = torch.randn(3, channels, generator=generator)
        aux[f"saliency/{name}"] = torch.rand(3, channels, generator=generator).requires_grad_()
        aux[f"features/{name}"] = torch.randn(3, channels, generator=generator).requires_grad_()
    return DynamicOutput(logits.requires_grad_(), {"a": gate([[1.0] * 3] * 3), "b": gate([[1.0] * 2] * 3)}, aux=aux)


def cross_entropies(logits: Tensor) -> list[float]:
    rows = logits.tolist()
    return [math.log(sum(math.exp(value) for value in row)) - row[label] for row, label in zip(rows, LABELS.tolist(), strict=True)]


def weights_by_hand(losses: list[float], bound: float, gamma: float) -> list[float]:
    return [max((bound - loss) / bound, 1e-10) ** gamma if loss < bound else 0.0 for loss in losses]


def similarity_by_hand(saliency: list[list[float]], features: list[list[float]]) -> float:
    def cosine(one: list[float], other: list[float]) -> float:
        return sum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))

    pairs = [(i, j) for i in range(len(saliency)) for j in range(len(saliency))]
    return sum((cosine(saliency[i], saliency[j]) - cosine(features[i], features[j])) ** 2 for i, j in pairs) / len(saliency) ** 2


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("easy", [0.1, 0.3, 0.9])
def test_the_terms_are_loops_over_layers_and_images(easy: float, gamma: float, output: DynamicOutput) -> None:
    terms = objective(easy=easy, gamma=gamma)(output, LABELS, LEDGER)
    assert list(terms) == ["cross_entropy", "complexity", "similarity"]
    losses = cross_entropies(output.logits)
    weight = weights_by_hand(losses, easy * 3.0, gamma)
    assert 0 < sum(value > 0 for value in weight) <= 3
    complexity = similarity = 0.0
    for name in ("a", "b"):
        saliency, features = output.aux[f"saliency/{name}"].tolist(), output.aux[f"features/{name}"].tolist()
        complexity += sum(w * sum(row) / len(row) for w, row in zip(weight, saliency, strict=True)) / 3
        similarity += similarity_by_hand(saliency, features)
    assert terms["cross_entropy"].item() == pytest.approx(sum(losses) / 3)
    assert terms["complexity"].item() == pytest.approx(0.3 * complexity, rel=1e-5)
    assert terms["similarity"].item() == pytest.approx(0.7 * similarity, rel=1e-5)


def test_hard_images_are_not_asked_to_be_sparse(output: DynamicOutput) -> None:
    losses = cross_entropies(output.logits)
    reference = 2 * (losses[2] + 0.01)  # with easy = 0.5 the second image alone is above the bound
    assert losses[0] < losses[2] < losses[1]
    (slope,) = torch.autograd.grad(objective(reference)(output, LABELS, LEDGER)["complexity"], output.aux["saliency/a"])
    assert bool((slope[1] == 0).all())
    assert bool((slope[0] > slope[2]).all())
    assert bool((slope[2] > 0).all())


def test_the_weight_is_a_constant(output: DynamicOutput) -> None:
    terms = objective()(output, LABELS, LEDGER)
    (slope,) = torch.autograd.grad(terms["complexity"], output.logits, allow_unused=True)
    assert slope is None
    assert not objective().weight(output.logits[:, 0]).requires_grad


def test_the_similarity_teaches_saliencies_and_features(output: DynamicOutput) -> None:
    saliency, features = (torch.rand(4, 3, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(distance, (saliency, features))
    term = objective()(output, LABELS, LEDGER)["similarity"]
    slopes = torch.autograd.grad(term, [output.aux[f"{kind}/{name}"] for kind in ("saliency", "features") for name in ("a", "b")])
    assert all(bool((slope != 0).any()) for slope in slopes)


def test_alike_saliencies_and_features_cost_nothing() -> None:
    rows = torch.rand(5, 4)
    assert distance(rows, 3 * rows).item() == pytest.approx(0, abs=1e-12)
    assert distance(rows, rows.flip(0)).item() > 1e-4


def test_an_image_without_any_saliency_has_a_finite_loss_and_gradient() -> None:
    response = torch.tensor([[-1.0, -2.0], [0.5, 1.0]]).requires_grad_()
    value = distance(response.relu(), torch.rand(2, 3))
    (slope,) = torch.autograd.grad(value, response)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(slope).all())
    assert bool((slope[0] == 0).all())


def test_cosines_are_not_rounded_under_autocast() -> None:
    rows = torch.rand(6, 40)
    with torch.autocast("cpu", torch.bfloat16):
        inside = distance(rows, rows.bfloat16())
    outside = distance(rows, rows.bfloat16())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    torch.testing.assert_close(cosines(rows).diagonal(), torch.ones(6))


def test_a_reference_of_zero_asks_nothing(output: DynamicOutput) -> None:
    assert objective(0.0)(output, LABELS, LEDGER)["complexity"].item() == 0


def test_twenty_steps_lower_the_loss(images: Tensor) -> None:
    torch.manual_seed(3)
    network, labels = ManiDP(8, width=8).train(), torch.arange(7)
    ledger, loss = price(network, images[:1]), objective(2.3, lasso=0.1, graph=1.0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    values = []
    for _ in range(20):
        terms = loss(network(images), labels, ledger)
        total = torch.stack(list(terms.values())).sum()
        values.append({name: term.item() for name, term in terms.items()} | {"total": total.item()})
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert values[-1]["total"] < 0.5 * values[0]["total"]
    assert values[-1]["cross_entropy"] < 0.5 * values[0]["cross_entropy"]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lasso": -0.1}, "lasso and graph must be finite and at least 0, got -0.1 and 0.7"),
        ({"graph": math.inf}, "got 0.3 and inf"),
        ({"easy": 0.0}, "easy and gamma must be finite and above 0, got 0.0 and 1.0"),
        ({"gamma": -1.0}, "got 0.5 and -1.0"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(**settings)


def test_a_run_without_a_reference_says_what_is_missing(output: DynamicOutput) -> None:
    with pytest.raises(ValueError, match="no reference cross entropy: add gatewatt.callbacks.SaliencyCalibration"):
        objective(None)(output, LABELS, LEDGER)


@pytest.mark.parametrize("execution", ["dense", "skipped"])
def test_an_output_without_masked_features_has_no_such_loss(execution: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match="for ManiDP in masked execution"):
        objective()(ManiDP(8, width=2)(images[:3], execution), LABELS, LEDGER)  # type: ignore[arg-type]
