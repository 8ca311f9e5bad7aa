"""The static comparator: one route, its price, and nothing that an attack could move."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from tests.contracts.zoo import sample, settled, warmed
from torch.nn import functional

from gatewatt.attacks import AutoEnergy, GradMDM
from gatewatt.defenses import FixedRoute, busiest_route, described
from gatewatt.defenses.route import route_of
from gatewatt.flops import compare_routes, price, random_patterns
from gatewatt.gating import forced, gate_table
from gatewatt.networks import SkipNet
from gatewatt.networks.checkpoint import save
from gatewatt.objectives import ComputeTarget

BLOCKS = ["block1", "block2", "block3", "block4", "block5"]


@pytest.fixture
def skipnet() -> SkipNet:
    torch.manual_seed(2)
    network = warmed(SkipNet(14, width=4))
    assert isinstance(network, SkipNet)
    return network


def test_a_route_is_the_network_with_these_decisions(skipnet: SkipNet) -> None:
    route = FixedRoute(skipnet, ["block2", "block5"])
    whole, images = price(skipnet, sample()[:1]), sample()[:3]
    pattern = {name: torch.full((3, 1), float(name in ("block2", "block5"))) for name in BLOCKS}
    with torch.no_grad(), forced(skipnet, pattern):
        expected = skipnet(images)
    ledger = price(route, images[:1])
    assert ledger.dense == whole(expected.gates)[0] < whole.dense
    assert ledger.fixed == whole.fixed
    with torch.no_grad():
        for execution in ("masked", "dense", "skipped"):
            output = route(images, execution)
            assert torch.allclose(output.logits, expected.logits, atol=1e-5)
            assert list(output.gates) == ["block2", "block5"]
            assert ledger(output.gates).tolist() == [ledger.dense] * 3
    assert compare_routes(route, images, ledger).agree
    for pattern in random_patterns(route, images, 3):
        assert compare_routes(route, images, ledger, pattern).agree


@pytest.mark.parametrize("family", ["sact", "avit", "manidp", "shallow-deep", "dvt"])
def test_every_family_has_routes(family: str) -> None:
    network, images = settled(family), sample()
    whole = price(network, images[:1])
    for share in (0.7, 1.0):
        budget = (whole.fixed + share * (whole.dense - whole.fixed)) / whole.dense
        route = FixedRoute(network, busiest_route(network, images, budget))
        ledger = price(route, images[:1])
        assert whole.fixed < ledger.dense <= budget * whole.dense
        assert compare_routes(route, images[:2], ledger).agree
        if share == 1:
            assert ledger.dense == whole.dense


def test_the_busiest_route_takes_the_most_used_gates_that_fit(skipnet: SkipNet) -> None:
    ledger, images = price(skipnet, sample()[:1]), sample()
    with torch.no_grad():
        used = gate_table(skipnet(images).gates).executed.mean(0).tolist()
    cost = {block: ledger.prices[f"trunk.blocks.{index}.residual"] for index, block in enumerate(BLOCKS, start=1)}
    for budget in (0.5, 0.7, 0.9, 1.0):
        route = busiest_route(skipnet, images, budget)
        left = budget * ledger.dense - ledger.fixed - sum(cost[block] for block in route)
        assert left >= 0
        closed = [block for block in BLOCKS if block not in route]
        # Nothing cheaper than what is left stays closed, and no single swap within the cap gains usage.
        assert all(cost[block] > left for block in closed)
        for inside, outside in ((a, b) for a, b in combinations(BLOCKS, 2) if (a in route) != (b in route)):
            worse, better = (inside, outside) if inside in route else (outside, inside)
            if cost[better] <= cost[worse]:
                assert used[BLOCKS.index(better)] <= used[BLOCKS.index(worse)]


def test_training_a_route_moves_what_it_runs_and_nothing_else(skipnet: SkipNet) -> None:
    route = FixedRoute(skipnet, ["block2", "block5"]).train()
    ledger, labels = price(route, sample()[:1]), torch.arange(12) % 10
    before = {name: tensor.clone() for name, tensor in route.state_dict().items()}
    optimizer = torch.optim.SGD([parameter for parameter in route.parameters() if parameter.requires_grad], 0.05)
    losses = []
    for _ in range(8):
        terms = ComputeTarget(0.7)(route(sample()), labels, ledger)
        losses.append(functional.cross_entropy(route(sample()).logits, labels).item())
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        assert all(parameter.grad is not None for parameter in route.parameters() if parameter.requires_grad)
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in route.state_dict().items() if not torch.equal(tensor, before[name])}
    still = ("gating", "trunk.blocks.1.residual", "trunk.blocks.3.residual", "trunk.blocks.4.residual")
    assert not any(name.startswith(still) for name in moved)
    assert any(name.startswith("trunk.blocks.2.residual") and name.endswith("weight") for name in moved)


def test_an_attack_runs_and_changes_no_flop(skipnet: SkipNet) -> None:
    route, images = FixedRoute(skipnet, ["block1", "block3"]), sample()[:3]
    ledger = price(route, images[:1])
    for attack in (GradMDM(steps=2), AutoEnergy(steps=2)):
        adversarial = attack(route, images).images
        assert bool(torch.isfinite(adversarial).all())
        with torch.no_grad():
            assert ledger(route(adversarial, "skipped").gates).tolist() == [ledger.dense] * 3


def test_a_route_is_found_again_by_the_card_of_its_checkpoint(skipnet: SkipNet, tmp_path: Path) -> None:
    route = FixedRoute(skipnet, ["block1", "block3"])
    file = tmp_path / "static.safetensors"
    save(skipnet, file, card={"defense": described(route)})
    assert route_of(file) == ("block1", "block3")
    assert described(FixedRoute(skipnet, str(file))) == described(route)
    for name, card in {"plain": {}, "undefended": {"defense": None}, "capped": {"defense": {"name": "BudgetGuard", "budget": 0.5}}}.items():
        save(skipnet, tmp_path / f"{name}.safetensors", card=card)
        assert route_of(tmp_path / f"{name}.safetensors") is None
    with pytest.raises(ValueError, match=r"plain.safetensors is of no static network: its card names no route"):
        FixedRoute(skipnet, str(tmp_path / "plain.safetensors"))


def test_an_impossible_route_says_so(skipnet: SkipNet) -> None:
    with pytest.raises(ValueError, match=r"open_gates must name gates of the network \(block1, .*block5\), got block9"):
        FixedRoute(skipnet, ["block1", "block9"])
    with pytest.raises(ValueError, match="got none"):
        FixedRoute(skipnet, [])
    with pytest.raises(ValueError, match="gate 'exit2' cannot stay open: a closed gate before it ends the route"):
        FixedRoute(settled("shallow-deep"), ["exit2"])
    with pytest.raises(ValueError, match=r"budget 0.02 has room for no gate"):
        busiest_route(skipnet, sample(), 0.02)
    with pytest.raises(ValueError, match=r"budget must be in \(0, 1\]"):
        busiest_route(skipnet, sample(), 1.5)
