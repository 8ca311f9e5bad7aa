"""The price of pondering, against sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicOutput
from gatewatt.objectives import CrossEntropy, PonderCost

LEDGER = FlopsLedger({"m": 1.0}, (Charge("m", ("a",)),), 1.0, 0.0, 0.0, (8, 8), {"a": 1})
LABELS = torch.tensor([2, 0])


def output() -> DynamicOutput:
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, -1.0]], requires_grad=True)
    return DynamicOutput(logits, {}, aux={"ponder": torch.tensor([6.5, 9.5], requires_grad=True)})


def test_the_terms_are_cross_entropy_and_the_weighted_mean_cost() -> None:
    terms = PonderCost(0.25)(output(), LABELS, LEDGER)
    assert list(terms) == ["cross_entropy", "ponder"]
    assert terms["ponder"].item() == pytest.approx(0.25 * (6.5 + 9.5) / 2)
    # Both images give their class a logit 1 and 2 above the others.
    assert terms["cross_entropy"].item() == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)))


def test_every_image_has_the_same_share_in_the_price() -> None:
    out = output()
    (slope,) = torch.autograd.grad(PonderCost(0.25)(out, LABELS, LEDGER)["ponder"], out.aux["ponder"])
    assert slope.tolist() == [0.125, 0.125]


def test_the_default_is_cifars_weight_and_labels_can_be_smoothed() -> None:
    terms = PonderCost(label_smoothing=0.1)(output(), LABELS, LEDGER)
    assert terms["ponder"].item() == pytest.approx(0.08)
    assert torch.equal(terms["cross_entropy"], CrossEntropy(0.1)(output(), LABELS, LEDGER)["cross_entropy"])


def test_without_a_weight_pondering_is_free() -> None:
    assert PonderCost(0.0)(output(), LABELS, LEDGER)["ponder"].item() == 0


@pytest.mark.parametrize(
    ("arguments", "message"), [({"weight": -0.1}, "weight must be at least 0, got -0.1"), ({"label_smoothing": 1.0}, "label_smoothing")]
)
def test_a_value_out_of_range_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PonderCost(**arguments)


def test_a_network_that_does_not_ponder_is_refused() -> None:
    silent: dict[str, Tensor] = {}
    with pytest.raises(ValueError, match="reports no ponder cost"):
        PonderCost()(output()._replace(aux=silent), LABELS, LEDGER)
