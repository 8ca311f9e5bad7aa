"""The loss of energy-adversarial training, term by term, against a count by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from tests.toys import LEDGER as LOGISTIC
from tests.toys import Logistic, gate
from torch import Tensor

from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicOutput, Gate
from gatewatt.objectives import ComputeTarget, EnergyAdversarialObjective
from gatewatt.objectives.robust import Distilled, divergence, flops_gap, gate_gap, gate_logits, saturation

LEDGER = FlopsLedger(
    prices={"a": 600.0, "b": 300.0},
    charges=(Charge("a", ("a",)), Charge("b", ("b",))),
    dense=1000.0,
    fixed=100.0,
    overhead=0.0,
    resolution=(8, 8),
    units={"a": 1, "b": 2},
)
LAMBDA = [600 / 900, 150 / 900, 150 / 900]
LABELS = torch.tensor([1, 0])


def half(scores: list[list[float]], logits: list[list[float]]) -> DynamicOutput:
    score = torch.tensor(scores).requires_grad_()
    opened = (score >= 0.5).float()
    gates = {"a": gate(opened[:, :1].tolist(), score[:, :1]), "b": gate(opened[:, 1:].tolist(), score[:, 1:])}
    return DynamicOutput(torch.tensor(logits).requires_grad_(), gates)


CLEAN = half([[0.8, 0.3, 0.6], [0.1, 0.7, 0.2]], [[0.5, 1.5], [2.0, -1.0]])
ATTACKED = half([[0.9, 0.6, 0.7], [0.7, 0.8, 0.4]], [[1.0, 0.2], [0.1, 0.3]])
PARENT: dict[str, Gate] = half([[0.9, 0.2, 0.4], [0.3, 0.6, 0.1]], [[0.0, 0.0], [0.0, 0.0]]).gates  # type: ignore[assignment]
DECIDED = [[1, 0, 0], [0, 1, 0]]


def cross_entropy(output: DynamicOutput) -> float:
    rows = output.logits.tolist()
    return sum(math.log(sum(map(math.exp, row))) - row[label] for row, label in zip(rows, LABELS.tolist(), strict=True)) / len(rows)


def distillation() -> float:
    total = 0.0
    for output in (CLEAN, ATTACKED):
        for image in range(2):
            scores = [score for g in output.gates.values() for score in g.score[image].tolist()]
            for share, score, wanted in zip(LAMBDA, scores, DECIDED[image], strict=True):
                total -= share * math.log(score if wanted else 1 - score)
    return total / 2


def test_the_terms_by_hand() -> None:
    objective = EnergyAdversarialObjective(ComputeTarget(0.5, weight=3.0), adversarial_weight=0.7, distillation=2.5)
    terms = objective(CLEAN, ATTACKED, LABELS, LEDGER, PARENT)
    assert list(terms) == ["cross_entropy", "compute", "adversarial_cross_entropy", "distillation"]
    # Images of 100 + 600 + 150 and 100 + 150 MACs: the target binds the clean half alone.
    assert terms["compute"].item() == pytest.approx(3 * (0.55 - 0.5) ** 2, rel=1e-5)
    assert terms["cross_entropy"].item() == pytest.approx(cross_entropy(CLEAN))
    assert terms["adversarial_cross_entropy"].item() == pytest.approx(0.7 * cross_entropy(ATTACKED))
    assert terms["distillation"].item() == pytest.approx(2.5 * distillation(), rel=1e-5)


def test_gates_that_decide_as_the_parent_with_certainty_are_at_rest() -> None:
    sure = half([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0]] * 2)
    term = EnergyAdversarialObjective()(sure, sure, LABELS, LEDGER, PARENT)["distillation"]
    assert term.item() == pytest.approx(0, abs=1e-4)
    wrong = half([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], [[0.0, 0.0]] * 2)
    assert bool(torch.isfinite(EnergyAdversarialObjective()(wrong, wrong, LABELS, LEDGER, PARENT)["distillation"]))


def test_the_parent_decides_with_its_own_threshold() -> None:
    strict = {name: Gate(g.score, torch.tensor(0.95), g.executed) for name, g in PARENT.items()}
    closed = half([[0.01] * 3] * 2, [[0.0, 0.0]] * 2)
    objective = EnergyAdversarialObjective(distillation=1.0)
    assert objective(closed, closed, LABELS, LEDGER, strict)["distillation"].item() == pytest.approx(-2 * math.log(0.99), rel=1e-4)


def test_both_halves_are_distilled_and_the_parent_is_not_trained() -> None:
    halves = (half([[0.8, 0.3, 0.6]] * 2, [[0.0, 0.0]] * 2), half([[0.4, 0.6, 0.7]] * 2, [[0.0, 0.0]] * 2))
    parent = half([[0.9, 0.2, 0.4]] * 2, [[0.0, 0.0]] * 2)
    EnergyAdversarialObjective()(*halves, LABELS, LEDGER, parent.gates)["distillation"].backward()  # type: ignore[arg-type]
    for output in halves:
        score = output.gates["a"].score
        assert score._base is not None
        assert score._base.grad is not None
        # Towards the parent: up where it is open, down where it is closed.
        assert (score._base.grad < 0).tolist() == [[True, False, False]] * 2
        assert score._base.grad.abs().min() > 0
    assert parent.gates["a"].score._base.grad is None  # type: ignore[union-attr]


def test_what_a_guard_closed_can_be_distilled_as_closed() -> None:
    # The parent's second gate asks for its first unit on the second image, and got nothing.
    refused = {**PARENT, "b": gate([[0.0, 0.0], [0.0, 0.0]], PARENT["b"].score)}
    asked, executed = (
        EnergyAdversarialObjective(distillation=1.0, distilled=kind)(CLEAN, ATTACKED, LABELS, LEDGER, refused)["distillation"].item()
        for kind in get_args(Distilled)
    )
    assert asked == pytest.approx(distillation(), rel=1e-5)
    changed = sum(math.log(score) - math.log(1 - score) for score in (0.7, 0.8))
    assert executed == pytest.approx(distillation() + LAMBDA[1] * changed / 2, rel=1e-5)
    nested = {**PARENT, "b": replace(PARENT["b"], within=("a",))}
    EnergyAdversarialObjective()(CLEAN, ATTACKED, LABELS, LEDGER, nested)
    with pytest.raises(ValueError, match="would teach gates within others, such as exits, to stay closed; set distilled to asked"):
        EnergyAdversarialObjective(distilled="executed")(CLEAN, ATTACKED, LABELS, LEDGER, nested)


def test_without_distillation_no_parent_is_needed() -> None:
    terms = EnergyAdversarialObjective(distillation=0.0)(CLEAN, ATTACKED, LABELS, LEDGER, None)
    assert list(terms) == ["cross_entropy", "adversarial_cross_entropy"]
    with pytest.raises(ValueError, match="distillation needs the parent's gates; give a parent or set distillation to 0"):
        EnergyAdversarialObjective()(CLEAN, ATTACKED, LABELS, LEDGER, None)


def test_no_term_goes_through_an_operator_that_autocast_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a GPU torch raises for it under any autocast, and the defend recipes train in bfloat16 there.
    def refuse(*arguments: object, **settings: object) -> None:
        raise RuntimeError("binary_cross_entropy is unsafe to autocast")

    monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy", refuse)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = EnergyAdversarialObjective()(CLEAN, ATTACKED, LABELS, LEDGER, PARENT)
    assert terms["distillation"].item() == pytest.approx(2 * distillation(), rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            ({name: -0.5}, f"{name} must be at least 0, got -0.5")
            for name in ("adversarial_weight", "distillation", "consistency", "gap", "gate_gap", "saturation")
        ),
        ({"gap": math.nan}, "gap must be at least 0, got nan"),
        ({"slack": 1.5}, r"slack must be in \[0, 1\], a fraction of the dense FLOPs, got 1.5"),
        ({"distilled": "wanted"}, "distilled must be asked or executed, got 'wanted'"),
        ({"limit": 0.0}, "limit must be positive, a distance in logits, got 0.0"),
        ({"ramp": (0.5, 0.2)}, "ramp must be two parts of the run, 0 <= start <= end <= 1, got 0.5 and 0.2"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyAdversarialObjective(**settings)


# ---- the gaps ----

ALL = {"adversarial_weight": 0.7, "distillation": 2.5, "consistency": 2.0, "gap": 4.0, "gate_gap": 0.5, "saturation": 0.1}
NAMES = {"adversarial_weight": "adversarial_cross_entropy"}
OFF = dict.fromkeys(ALL, 0.0)


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def scores_of(output: DynamicOutput) -> list[list[float]]:
    return torch.cat([each.score for each in output.gates.values()], 1).detach().double().tolist()


def softmax(row: list[float]) -> list[float]:
    total = sum(map(math.exp, row))
    return [math.exp(value) / total for value in row]


def test_the_terms_of_the_gaps_by_hand() -> None:
    settings = {"consistency": 2.0, "gap": 4.0, "slack": 0.02, "gate_gap": 0.5, "saturation": 0.3, "limit": 0.75}
    terms = EnergyAdversarialObjective(adversarial_weight=0.0, distillation=0.0, **settings)(CLEAN, ATTACKED, LABELS, LEDGER, None)
    assert list(terms) == ["cross_entropy", "consistency", "gap", "gate_gap", "saturation"]
    rows = zip(CLEAN.logits.tolist(), ATTACKED.logits.tolist(), strict=True)
    kl = [sum(p * math.log(p / q) for p, q in zip(softmax(clean), softmax(attacked), strict=True)) for clean, attacked in rows]
    assert terms["consistency"].item() == pytest.approx(2 * sum(kl) / 2, rel=1e-5)
    # 850 and 250 MACs of 1000 on the clean images, 1000 and 850 on the attacked ones.
    assert terms["gap"].item() == pytest.approx(4 * ((0.15 - 0.02) + (0.6 - 0.02)) / 2, rel=1e-6)
    rises, beyond = 0.0, 0.0
    for clean, attacked in zip(scores_of(CLEAN), scores_of(ATTACKED), strict=True):
        rises += sum(share * max(logit(b) - logit(a), 0) for share, a, b in zip(LAMBDA, clean, attacked, strict=True))
        beyond += sum(share * max(abs(logit(score)) - 0.75, 0) for half in (clean, attacked) for share, score in zip(LAMBDA, half, strict=True))
    assert terms["gate_gap"].item() == pytest.approx(0.5 * rises / 2, rel=1e-5)
    assert terms["saturation"].item() == pytest.approx(0.3 * beyond / 4, rel=1e-5)
    assert rises > 0.1
    assert beyond > 0.1


def test_an_image_that_got_cheaper_counts_nothing_and_none_pays_for_another() -> None:
    # The second image falls from 850 to 250 MACs and must not make up for the first, which rises from 250 to 850.
    swapped = half([[0.1, 0.7, 0.2], [0.8, 0.3, 0.6]], [[0.0, 0.0]] * 2), half([[0.8, 0.3, 0.6], [0.1, 0.7, 0.2]], [[0.0, 0.0]] * 2)
    assert flops_gap(*swapped, LEDGER, 0.02).tolist() == pytest.approx([0.58, 0.0])
    assert gate_gap(*swapped, LEDGER).tolist() == pytest.approx(
        [LAMBDA[0] * (logit(0.8) - logit(0.1)) + LAMBDA[2] * (logit(0.6) - logit(0.2)), LAMBDA[1] * (logit(0.7) - logit(0.3))], rel=1e-5
    )


@pytest.mark.parametrize("name", ALL)
def test_a_weight_of_0_removes_its_term_and_no_other(name: str) -> None:
    def names(weights: dict[str, float]) -> set[str]:
        parent = PARENT if weights["distillation"] else None
        return set(EnergyAdversarialObjective(**weights)(CLEAN, ATTACKED, LABELS, LEDGER, parent))  # type: ignore[arg-type]

    term = NAMES.get(name, name)
    assert names({**OFF, name: ALL[name]}) == {"cross_entropy", term}
    assert names(ALL) - names({**ALL, name: 0.0}) == {term}


def test_a_term_that_is_left_out_is_not_computed() -> None:
    nothing: Any = None
    terms = EnergyAdversarialObjective(**OFF)(CLEAN, nothing, LABELS, nothing, nothing)  # type: ignore[arg-type]
    assert terms.keys() == {"cross_entropy"}


def test_radius_and_gap_rise_linearly_and_then_stay() -> None:
    objective = EnergyAdversarialObjective(distillation=0.0, gap=4.0, gate_gap=0.5, ramp=(0.15, 0.4))
    assert EnergyAdversarialObjective().strength() == 1
    found = {}
    for progress in (0.0, 0.1, 0.15, 0.2, 0.275, 0.4, 0.99):
        objective.progress = progress
        terms = objective(CLEAN, ATTACKED, LABELS, LEDGER, None)
        assert terms["gap"].item() == pytest.approx(4 * 0.355 * objective.strength())
        assert terms["gate_gap"].item() > 0
        found[progress] = objective.strength()
    assert found == pytest.approx({0.0: 0, 0.1: 0, 0.15: 0, 0.2: 0.2, 0.275: 0.5, 0.4: 1, 0.99: 1})
    sudden = EnergyAdversarialObjective(ramp=(0.5, 0.5))
    for sudden.progress, strength in ((0.0, 0), (0.49, 0), (0.5, 1)):
        assert sudden.strength() == strength


# ---- their gradients, against finite differences in float64 ----


def by_pixels(of: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Gradient of a number by central differences."""
    found = torch.zeros_like(images)
    for index in range(images.numel()):
        step = torch.zeros_like(images)
        step.view(-1)[index] = 1e-6
        found.view(-1)[index] = (of(images + step) - of(images - step)) / 2e-6
    return found


@pytest.fixture
def pair() -> tuple[Logistic, Tensor, Tensor]:
    toy, generator = Logistic().double().eval(), torch.Generator().manual_seed(2)
    images = torch.rand(8, 3, 2, 2, generator=generator).double()
    return toy, images, (images + 0.4 * torch.randn(images.shape, generator=generator).double()).clamp(0, 1)


def logits_by_hand(toy: Logistic, images: Tensor) -> Tensor:
    return (images.flatten(1) - 0.5) @ toy.weight.detach().T + toy.bias.detach()


def spent_by_hand(usage: Tensor) -> Tensor:
    return 48 + 108 * usage[:, :3].sum(1) / 3 + 24 * usage[:, 3:].sum(1) / 2


def test_the_gap_descends_the_cost_of_the_attacked_image_alone(pair: tuple[Logistic, Tensor, Tensor]) -> None:
    toy, images, attacked = pair
    images, attacked = images.requires_grad_(), attacked.requires_grad_()
    gaps = flops_gap(toy(images), toy(attacked), LOGISTIC, 0.02)
    assert 1 < (gaps > 0).sum() < 8
    gradient, clean_gradient = torch.autograd.grad(gaps.mean(), [attacked, images], allow_unused=True)
    assert clean_gradient is None

    score = torch.sigmoid(logits_by_hand(toy, attacked.detach()))
    clean = spent_by_hand((logits_by_hand(toy, images.detach()) >= 0).double())

    def mean_gap(moved: Tensor) -> Tensor:
        # What is open stays open: the decisions jump, and lend their scores' slopes.
        usage = (score >= 0.5).double() + torch.sigmoid(logits_by_hand(toy, moved)) - score
        return ((spent_by_hand(usage) - clean) / 180 - 0.02).clamp_min(0).mean()

    assert mean_gap(attacked.detach()).item() == pytest.approx(gaps.mean().item(), rel=1e-12)
    torch.testing.assert_close(gradient, by_pixels(mean_gap, attacked.detach()), rtol=1e-6, atol=1e-9)
    assert gradient.abs().max() > 1e-3


def test_the_gap_of_the_gates_descends_the_logits_of_the_attacked_image_alone(pair: tuple[Logistic, Tensor, Tensor]) -> None:
    toy, images, attacked = pair
    images, attacked = images.requires_grad_(), attacked.requires_grad_()
    gradient, clean_gradient = torch.autograd.grad(gate_gap(toy(images), toy(attacked), LOGISTIC).mean(), [attacked, images], allow_unused=True)
    assert clean_gradient is None
    shares = torch.tensor([36.0] * 3 + [12.0] * 2).double() / 132
    clean = logits_by_hand(toy, images.detach())

    def mean_gap(moved: Tensor) -> Tensor:
        return ((logits_by_hand(toy, moved) - clean).clamp_min(0) * shares).sum(1).mean()

    torch.testing.assert_close(gradient, by_pixels(mean_gap, attacked.detach()), rtol=1e-6, atol=1e-9)


def test_the_divergence_trains_both_halves(pair: tuple[Logistic, Tensor, Tensor]) -> None:
    toy, images, attacked = pair
    halves = [toy(each).logits.detach().requires_grad_() for each in (images, attacked)]
    outputs = [DynamicOutput(logits, toy(images).gates) for logits in halves]
    torch.testing.assert_close(
        divergence(outputs[0], outputs[1]).double(),
        torch.tensor(
            [
                sum(p * math.log(p / q) for p, q in zip(softmax(clean), softmax(other), strict=True))
                for clean, other in zip(halves[0].tolist(), halves[1].tolist(), strict=True)
            ],
            dtype=torch.float64,
        ),
        rtol=1e-4,
        atol=1e-6,
    )
    gradients = torch.autograd.grad(divergence(outputs[0], outputs[1]).sum(), halves)
    assert all(bool((gradient.abs().sum(1) > 0).all()) for gradient in gradients)


def test_saturated_gates_are_drawn_back_from_both_sides_and_others_left_alone() -> None:
    # In float32, as networks have them: firmly closed gates keep their slope as far as they reach, open ones until their score is exactly 1.
    logits = torch.tensor([[-30.0, -9.0, -7.0], [7.0, 9.0, 12.0]], requires_grad=True)
    score = torch.sigmoid(logits)
    gates = {"a": Gate(score[:, :1], torch.tensor(0.5), score[:, :1]), "b": Gate(score[:, 1:], torch.tensor(0.5), score[:, 1:])}
    output = DynamicOutput(torch.zeros(2, 2), gates)
    torch.testing.assert_close(gate_logits(output).float(), logits.detach(), rtol=1e-3, atol=1e-3)
    beyond = saturation(output, LEDGER)
    assert beyond.tolist() == pytest.approx([LAMBDA[0] * 22 + LAMBDA[1], LAMBDA[1] + LAMBDA[2] * 4], rel=1e-2)
    (gradient,) = torch.autograd.grad(beyond.sum(), logits)
    wanted = [[-LAMBDA[0], -LAMBDA[1], 0.0], [0.0, LAMBDA[1], LAMBDA[2]]]
    torch.testing.assert_close(gradient, torch.tensor(wanted), rtol=5e-2, atol=1e-6)


def test_exact_zeros_and_ones_give_finite_terms_and_gradients() -> None:
    sure = half([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0]] * 2), half([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]], [[0.0, 0.0]] * 2)
    terms = EnergyAdversarialObjective(**ALL)(*sure, LABELS, LEDGER, PARENT)  # type: ignore[arg-type]
    torch.stack(list(terms.values())).sum().backward()
    assert all(bool(torch.isfinite(term)) for term in terms.values())
    for output in sure:
        base = output.gates["a"].score._base
        assert base is not None
        assert base.grad is not None
        assert bool(torch.isfinite(base.grad).all())
