"""The ledger law, its derivative and its bookkeeping, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from tests.toys import gate
from torch import Tensor

from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, Gate, gate_table

LEDGER = FlopsLedger(
    prices={"stem": 800.0, "conv": 1200.0, "attention": 5000.0},
    charges=(Charge("stem", ("a",)), Charge("conv", ("a", "b")), Charge("attention", ("t", "t"))),
    dense=7100.0,
    fixed=100.0,
    overhead=10.0,
    resolution=(8, 8),
    units={"a": 4, "b": 3, "t": 10, "free": 2},
)
"""A block, a product law (channels in x out) and a square law (attention over tokens); gate ``free`` is charged nothing."""


@pytest.fixture
def gates() -> dict[str, Gate]:
    """Three images: some units, all units, next to none."""
    return {
        "a": gate([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
        "b": gate([[1, 0, 1], [1, 1, 1], [0, 1, 0]]),
        "t": gate([[1.0] * 3 + [0.0] * 7, [1.0] * 10, [0.0] * 9 + [1.0]]),
        "free": gate([[0, 1], [1, 1], [0, 0]]),
    }


def with_scores(gates: dict[str, Gate], scores: dict[str, Tensor]) -> dict[str, Gate]:
    return {name: replace(gates[name], score=score) for name, score in scores.items()}


def test_the_law_by_hand(gates: dict[str, Gate]) -> None:
    flops = LEDGER(gates)
    assert flops.dtype == torch.float64
    assert flops.tolist() == [
        100 + 800 * 1 / 4 + 1200 * (1 / 4) * (2 / 3) + 5000 * (3 / 10) ** 2,
        7100,
        100 + 0 + 0 + 5000 * (1 / 10) ** 2,
    ]


def test_each_image_pays_for_itself(gates: dict[str, Gate]) -> None:
    for image in range(3):
        alone = {name: Gate(g.score[image : image + 1], g.threshold, g.executed[image : image + 1]) for name, g in gates.items()}
        assert LEDGER(alone).tolist() == LEDGER(gates)[image : image + 1].tolist()


def test_flops_are_whole_numbers_where_float32_would_round() -> None:
    prices = {str(index): float(2**24 + 1 + 2 * index) for index in range(32)}
    charges = tuple(Charge(name, (name,)) for name in prices)
    ledger = FlopsLedger(prices, charges, sum(prices.values()) + 3, 3.0, 0.0, (8, 8), dict.fromkeys(prices, 1))
    opened = {name: gate([[1.0], [float(index % 2)]]) for index, name in enumerate(prices)}
    everything, half = ledger(opened).tolist()
    assert everything == 3 + sum(2**24 + 1 + 2 * index for index in range(32))
    assert half == 3 + sum(2**24 + 1 + 2 * index for index in range(1, 32, 2))


def test_flops_follow_what_ran_and_not_what_the_scores_ask_for() -> None:
    # An earlier exit stopped the image although its gate asks for more.
    stopped = {name: Gate(torch.full((1, units), 0.9), torch.tensor(0.5), torch.zeros(1, units)) for name, units in LEDGER.units.items()}
    assert LEDGER(stopped).tolist() == [100]


def test_weights_are_the_finite_differences_of_the_law_at_full_width(gates: dict[str, Gate]) -> None:
    def law(name: str, unit: int, executed: float) -> float:
        opened = {key: torch.ones(1, units, dtype=torch.float64) for key, units in LEDGER.units.items()}
        opened[name][0, unit] = executed
        return LEDGER({key: Gate(ran, torch.tensor(0.5), ran) for key, ran in opened.items()}).item()

    units = [(name, unit) for name, count in LEDGER.units.items() for unit in range(count)]
    # Central differences are exact for laws up to the square.
    slopes = [(law(name, unit, 1.25) - law(name, unit, 0.75)) / 0.5 for name, unit in units]
    weights = LEDGER.weights(gates)
    assert weights.dtype == torch.float64
    assert weights.sum().item() == pytest.approx(1, abs=1e-15)
    assert weights.tolist() == pytest.approx([slope / sum(slopes) for slope in slopes], abs=1e-12)
    # By hand: a unit of ``a`` saves 800/4 + 1200/4, one of ``b`` 1200/3, a token 2 * 5000/10, a free unit nothing.
    total = 4 * 500 + 3 * 400 + 10 * 1000
    assert weights.tolist() == pytest.approx([500 / total] * 4 + [400 / total] * 3 + [1000 / total] * 10 + [0.0] * 2, abs=1e-15)


def test_weights_stand_in_the_order_of_the_gate_table(gates: dict[str, Gate]) -> None:
    turned = {name: gates[name] for name in ("t", "free", "b", "a")}
    assert len(LEDGER.weights(turned)) == gate_table(turned).score.shape[1]
    assert torch.equal(LEDGER.weights(turned)[:10], LEDGER.weights(gates)[7:17])
    assert torch.equal(LEDGER.weights(turned)[-4:], LEDGER.weights(gates)[:4])


def test_the_surrogate_has_the_value_of_the_ledger(gates: dict[str, Gate]) -> None:
    assert LEDGER.surrogate(gates).tolist() == LEDGER(gates).tolist()


def test_the_gradient_of_the_surrogate_is_price_over_units(gates: dict[str, Gate]) -> None:
    scores = {name: g.score.clone().requires_grad_() for name, g in gates.items()}
    flops = LEDGER.surrogate(with_scores(gates, scores))
    slopes = dict(zip(scores, torch.autograd.grad(flops.sum(), list(scores.values()), allow_unused=True), strict=True))
    used = {"a": [1 / 4, 1, 0], "b": [2 / 3, 1, 1 / 3], "t": [3 / 10, 1, 1 / 10]}
    for image in range(3):
        assert slopes["a"][image].tolist() == pytest.approx([800 / 4 + 1200 * used["b"][image] / 4] * 4)
        assert slopes["b"][image].tolist() == pytest.approx([1200 * used["a"][image] / 3] * 3)
        assert slopes["t"][image].tolist() == pytest.approx([2 * 5000 * used["t"][image] / 10] * 10)
    assert slopes["free"] is None


NESTED = FlopsLedger(
    prices={"segment1": 700.0, "segment2": 500.0, "segment3": 1100.0, "block": 900.0},
    charges=(Charge("segment1", ("exit1",)), Charge("segment2", ("exit2",)), Charge("segment3", ("exit3",)), Charge("block", ("channels",))),
    dense=3300.0,
    fixed=100.0,
    overhead=0.0,
    resolution=(8, 8),
    units={"exit1": 1, "exit2": 1, "exit3": 1, "channels": 2},
)
"""Three exits in a chain, and two channels of a block in the second segment."""
WITHIN: dict[str, tuple[str, ...]] = {"exit1": (), "exit2": ("exit1",), "exit3": ("exit1", "exit2"), "channels": ("exit1", "exit2")}


def nested_law(one: float, two: float, three: float, *channels: float) -> float:
    """What ran, whatever the scores are: a number between 0 and 1 is a share."""
    return 100 + one * (700 + two * (500 + three * 1100 + 900 * sum(channels) / 2))


def test_the_surrogate_of_nested_gates_is_what_ran_and_its_gradient_the_finite_difference() -> None:
    # Every pattern of what the five units ask for; the straight-through gradient is that of the law with scores for decisions.
    asked = torch.tensor(list(product((0.0, 1.0), repeat=5)), dtype=torch.float64)
    scores = [part.clone().requires_grad_() for part in asked.split([1, 1, 1, 2], dim=1)]
    gates = {name: Gate(score, torch.tensor(0.5), score.detach(), within=WITHIN[name]) for name, score in zip(WITHIN, scores, strict=True)}
    flops = NESTED.surrogate(gates)
    ran = {name: replace(gate, executed=gate.executed * stacked(gates, gate.within)) for name, gate in gates.items()}
    assert flops.tolist() == NESTED(ran).tolist() == [nested_law(*units) for units in asked.tolist()]
    slopes = torch.cat(torch.autograd.grad(flops.sum(), scores), dim=1)
    for units, slope in zip(asked.tolist(), slopes.tolist(), strict=True):
        moved = [[[*units[:unit], units[unit] + step, *units[unit + 1 :]] for step in (0.25, -0.25)] for unit in range(5)]
        # Exact: the law is linear in each unit.
        assert slope == pytest.approx([(nested_law(*up) - nested_law(*down)) / 0.5 for up, down in moved], abs=1e-9)


def stacked(gates: dict[str, Gate], names: tuple[str, ...]) -> Tensor:
    """1 where all of the gates named ask for more, (B, 1)."""
    return torch.stack([torch.ones(32, 1), *(gates[name].open.float() for name in names)]).prod(0)


def test_what_is_booked_on_gates_is_what_exceeds_the_fixed_part(gates: dict[str, Gate]) -> None:
    booked = LEDGER.per_gate(gates)
    assert list(booked) == list(gates)
    assert sum(booked.values()).tolist() == (LEDGER(gates) - LEDGER.fixed).tolist()
    # The product is booked on its last gate, which completes it.
    assert booked["a"].tolist() == [200, 800, 0]
    assert booked["b"].tolist() == [1200 * (1 / 4) * (2 / 3), 1200, 0]
    assert booked["t"].tolist() == [450, 5000, 50]
    assert booked["free"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["__call__", "surrogate", "per_gate", "weights"])
def test_a_network_without_gates_has_no_flops_to_tell_apart(method: str) -> None:
    with pytest.raises(ValueError, match="returned no gates"):
        getattr(LEDGER, method)({})


def test_a_gate_that_is_charged_and_missing_is_named(gates: dict[str, Gate]) -> None:
    del gates["b"]
    with pytest.raises(KeyError, match="module 'conv' is charged to gate 'b', which the network did not return"):
        LEDGER(gates)


def test_a_unit_pays_for_what_follows_it(gates: dict[str, Gate]) -> None:
    # Of the four units of "a" the third image's neighbours run too: charged by what ran, weighed with the units that decide.
    wider = replace(gates["a"], executed=torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]), follows="a")
    ledger = replace(LEDGER, charges=(Charge("stem", ("wider",)), Charge("conv", ("a",))), units={"a": 4, "wider": 4, "b": 3})
    given = {"a": gates["a"], "wider": wider, "b": gates["b"]}
    assert ledger(given).tolist() == [100 + 800 * 2 / 4 + 1200 / 4, 100 + 800 + 1200, 100]
    assert gate_table(given).score.shape == (3, 7)
    assert ledger.weights(given).tolist() == pytest.approx([1 / 4] * 4 + [0] * 3)
