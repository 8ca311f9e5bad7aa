"""The loss of energy-adversarial training, term by term, against a count by hand."""

from __future__ import annotations

import math

import pytest
import torch
from tests.toys import gate

from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicOutput, Gate
from gatewatt.objectives import ComputeTarget, EnergyAdversarialObjective

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


@pytest.mark.parametrize("settings", [{"adversarial_weight": -1.0}, {"distillation": -0.5}])
def test_a_negative_weight_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="adversarial_weight and distillation must be at least 0"):
        EnergyAdversarialObjective(**settings)  # type: ignore[arg-type]
