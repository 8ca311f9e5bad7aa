"""What is reserved for is always affordable, the cap holds all the same, and what is not asked for goes to others."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from tests.contracts.zoo import sample, settled
from tests.training import skipnet

from gatewatt.defenses import BudgetGuard, FixedRoute, ReservingGuard, busiest_route, described
from gatewatt.flops import price
from gatewatt.gating import forced, gate_table
from gatewatt.networks import SkipNet
from gatewatt.networks.checkpoint import save


@pytest.fixture(scope="module")
def network() -> SkipNet:
    torch.manual_seed(2)
    return SkipNet(14, width=4).eval()


def by_hand(prices: list[float], fixed: float, cap: float, reserved: set[int], asked: list[int]) -> list[int]:
    """What blocks of known prices run where some are reserved for."""
    spent, ran = fixed, []
    for index, (wanted, cost) in enumerate(zip(asked, prices, strict=True)):
        later = sum(prices[other] for other in reserved if other > index)
        ran.append(int(wanted and spent + cost + later <= cap + 1e-6))
        spent += ran[-1] * cost
    return ran


def test_every_pattern_of_every_reserve_is_served_as_stated(network: SkipNet) -> None:
    ledger = price(network, torch.zeros(1, 3, 32, 32))
    names, prices = list(ledger.units), list(ledger.prices.values())
    asked = torch.tensor(list(product([0, 1], repeat=len(names))))
    images = torch.rand(len(asked), 3, 32, 32)
    pattern = {name: asked[:, [index]].float() for index, name in enumerate(names)}
    for budget, count in product((0.55, 0.75), (1, 2)):
        fitting = [some for some in combinations(range(len(names)), count) if ledger.fixed + sum(prices[i] for i in some) <= budget * ledger.dense]
        assert fitting
        for reserved in fitting:
            guard = ReservingGuard(network, budget, [names[index] for index in reserved])
            expected = [by_hand(prices, ledger.fixed, guard.certificate, set(reserved), row) for row in asked.tolist()]
            for execution in ("masked", "skipped"):
                with torch.no_grad(), forced(guard, pattern):
                    gates = guard(images, execution).gates  # type: ignore[arg-type]
                executed = gate_table(gates).executed.int()
                assert executed.tolist() == expected
                assert ledger(gates).max() <= guard.certificate <= budget * ledger.dense
                for index in reserved:
                    assert torch.equal(executed[:, index], asked[:, index].int())


def test_the_busiest_route_runs_whole_where_first_come_cuts_its_end_off(network: SkipNet) -> None:
    ledger = price(network, torch.zeros(1, 3, 32, 32))
    last = list(ledger.units)[-2:]
    budget = (ledger.fixed + sum(ledger.prices[f"trunk.blocks.{name.removeprefix('block')}.residual"] for name in last)) / ledger.dense
    wish = {name: torch.ones(2, 1) for name in ledger.units}
    images = torch.rand(2, 3, 32, 32)

    def ran(guard: BudgetGuard) -> list[str]:
        with torch.no_grad(), forced(guard, wish):
            return [name for name, gate in guard(images, "skipped").gates.items() if bool(gate.executed.all())]

    assert ran(ReservingGuard(network, budget, last)) == last
    assert last[-1] not in ran(BudgetGuard(network, budget))


@pytest.mark.parametrize("family", ["sact", "avit", "manidp", "dvt", "shallow-deep"])
def test_the_cap_holds_with_many_units_and_exits(family: str) -> None:
    inner = settled(family)
    images = sample()[:4]
    ledger = price(inner, images[:1])
    budget = (ledger.fixed + 0.6 * (ledger.dense - ledger.fixed)) / ledger.dense
    # A gate is reserved for with all that its decision may settle, and of ManiDP's channels a convolution's two sides would count twice.
    route = busiest_route(inner, images, budget if family != "manidp" else 0.6 * budget)
    guard = ReservingGuard(inner, budget, route)
    with torch.no_grad():
        scores = inner(images, "dense").gates
        for wish in (None, {name: torch.ones_like(gate.score) for name, gate in scores.items() if gate.follows is None}):
            for execution in ("masked", "skipped"):
                if wish is None:
                    spent = ledger(guard(images, execution).gates)  # type: ignore[arg-type]
                else:
                    with forced(guard, wish):
                        spent = ledger(guard(images, execution).gates)  # type: ignore[arg-type]
                assert spent.max() <= guard.certificate


def test_a_static_checkpoint_names_what_is_reserved(tmp_path: Path) -> None:
    inner = skipnet(depth=14)
    save(inner, tmp_path / "static.safetensors", card={"defense": described(FixedRoute(skipnet(depth=14), ["block2", "block5"]))})
    save(inner, tmp_path / "plain.safetensors", card={})
    assert ReservingGuard(inner, 0.8, str(tmp_path / "static.safetensors")).reserved == ("block2", "block5")
    with pytest.raises(ValueError, match=r"plain.safetensors is of no static network: its card names no route; give the gates"):
        ReservingGuard(inner, 0.8, str(tmp_path / "plain.safetensors"))


@pytest.mark.parametrize(
    ("reserved", "message"),
    [
        (["block9"], r"reserved must name gates of the network \(block1, .*block5\), got block9"),
        ([], r"reserved must name gates of the network .* got none"),
        (["block1", "block2", "block3"], r"the reserved gates cost [\d,]+ MACs with what always runs, and the cap is [\d,]+"),
    ],
)
def test_reserves_that_cannot_be_are_refused(reserved: list[str], message: str, network: SkipNet) -> None:
    with pytest.raises(ValueError, match=message):
        ReservingGuard(network, 0.5, reserved)
