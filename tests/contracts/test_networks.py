"""What every dynamic network promises, whatever its family."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.contracts.zoo import FAMILIES, OBJECTIVES, sample, settled
from torch import Tensor

from gatewatt.attacks import EnergyAttack, HingeLoss, L2Ball, LinfBall, ProjectedAttack, SquareSearch, under_attack
from gatewatt.defenses.nesting import lies_within
from gatewatt.flops import FlopsLedger, compare_routes, price, random_patterns
from gatewatt.gating import DynamicNetwork, DynamicOutput, Gate, check_finite, forced, gate_table, split_output
from gatewatt.networks import ManiDP, ShallowDeep
from gatewatt.networks.checkpoint import load, save

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def network(family: str) -> DynamicNetwork:
    return settled(family)


@pytest.fixture(scope="module")
def ledger(network: DynamicNetwork) -> FlopsLedger:
    return price(network, sample()[:1])


def everywhere(gates: Mapping[str, Gate], value: float) -> dict[str, Tensor]:
    return {name: torch.full_like(gate.score, value) for name, gate in gates.items() if gate.follows is None}


def test_gates_keep_the_contract(network: DynamicNetwork, ledger: FlopsLedger) -> None:
    with torch.no_grad():
        for execution in ("masked", "dense", "skipped"):
            output = network(sample(), execution)  # type: ignore[arg-type]
            check_finite(output)
            assert list(output.gates) == list(ledger.units)
            for name, gate in output.gates.items():
                assert gate.score.shape == gate.executed.shape == (len(sample()), ledger.units[name])
                assert gate.score.dtype == torch.float32
                assert 0 <= gate.score.min() <= gate.score.max() <= 1
                assert set(gate.executed.unique().tolist()) <= {0.0, 1.0}
                assert not gate.executed.requires_grad
                if execution != "dense":
                    # What ran was asked for; what was asked for may have been stopped earlier.
                    assert bool((gate.executed <= gate.open.float()).all())
    assert {name for charge in network.charges for name in charge.gates} == set(ledger.units) - {
        name for name, gate in output.gates.items() if all(name not in charge.gates for charge in network.charges)
    }


def test_the_dense_pass_spends_everything(network: DynamicNetwork, ledger: FlopsLedger) -> None:
    with torch.no_grad():
        assert ledger(network(sample(), "dense").gates).tolist() == [ledger.dense] * len(sample())
    assert ledger.fixed + sum(ledger.prices.values()) == ledger.dense
    assert 0 <= ledger.overhead <= ledger.fixed


def test_all_gates_open_is_the_static_network(network: DynamicNetwork) -> None:
    with torch.no_grad():
        dense = network(sample(), "dense")
        with forced(network, everywhere(dense.gates, 1.0)):
            opened = network(sample(), "masked")
    if isinstance(network, ManiDP):
        pytest.skip("ManiDP scales kept channels by their saliency; its static parent does not")
    if isinstance(network, ShallowDeep):
        # Where no exit is sure, the most confident answers; the last exit is the static network's.
        assert torch.allclose(opened.exits[:, -1], dense.logits, atol=1e-5)  # type: ignore[index]
    elif "ponder" in dense.aux:
        # A halting network that is forced to go on still averages its states with their scores.
        assert all(bool((gate.executed == 1).all()) for gate in opened.gates.values())
    else:
        assert torch.allclose(opened.logits, dense.logits, atol=1e-5)


def test_the_surrogate_is_what_ran_whatever_the_gates_ask_for(network: DynamicNetwork, ledger: FlopsLedger) -> None:
    with torch.no_grad():
        own = network(sample()).gates
        assert ledger.surrogate(own).tolist() == ledger(own).tolist()
        for pattern in random_patterns(network, sample(), 4, seed=5):
            with forced(network, pattern):
                gates = network(sample()).gates
            # A gate within others may ask for what cannot run; a halting score cannot.
            asked = {name: replace(gate, score=pattern[name] if gate.within else gate.executed) for name, gate in gates.items()}
            assert ledger.surrogate(asked).tolist() == ledger(gates).tolist()


def test_a_gate_names_the_gates_that_it_lies_within(network: DynamicNetwork) -> None:
    with torch.no_grad():
        gates = network(sample()).gates
    nested = {name: around for name, around in lies_within(network, 32).items() if around}
    halting = "ponder" in network(sample()[:1], "dense").aux
    assert {name: gate.within for name, gate in gates.items() if gate.within} == ({} if halting else nested)
    if halting:
        assert nested
        for name, around in nested.items():
            # What has halted never asks again, so a halting score needs no chain.
            assert all(bool((gates[name].open <= gates[outer].open).all()) for outer in around)


def test_four_routes_agree_and_skipping_changes_no_logit(network: DynamicNetwork, ledger: FlopsLedger) -> None:
    for rows in ([0], [3, 9], [1, 4, 7, 10, 11]):
        routes = compare_routes(network, sample()[rows], ledger)
        assert routes.agree, routes
    for batch, count in ((1, 4), (2, 3), (3, 3)):
        images = sample()[4 : 4 + batch]
        for pattern in random_patterns(network, images, count, seed=batch):
            routes = compare_routes(network, images, ledger, pattern)
            assert routes.agree, routes


def test_nothing_but_the_fixed_part_is_left_when_all_gates_close(network: DynamicNetwork, ledger: FlopsLedger) -> None:
    images = sample()[:2]
    with torch.no_grad():
        closed = everywhere(network(images, "dense").gates, 0.0)
    routes = compare_routes(network, images, ledger, closed)
    assert routes.agree
    assert routes.ledger == 2 * ledger.fixed


def test_gradients_reach_the_pixels_from_every_gate(network: DynamicNetwork) -> None:
    images = sample().clone().requires_grad_()
    for name, gate in network(images).gates.items():
        if gate.follows is None:
            (gradient,) = torch.autograd.grad(gate.score.sum(), images, retain_graph=True)
            assert bool(torch.isfinite(gradient).all()), name
            assert bool((gradient.flatten(1).abs().amax(1) > 0).any()), f"no image gets a gradient from {name}"


@pytest.mark.parametrize("execution", ["masked", "skipped"])
def test_a_batch_gives_what_its_images_give_one_by_one(execution: str, network: DynamicNetwork) -> None:
    with torch.no_grad():
        whole = network(sample(), execution)  # type: ignore[arg-type]
        parts = split_output(whole, [1] * len(sample()))
        for index in (0, 5, 11):
            alone = network(sample()[index : index + 1], execution)  # type: ignore[arg-type]
            assert torch.allclose(alone.logits, parts[index].logits, rtol=1e-4, atol=1e-5)
            for name, gate in alone.gates.items():
                assert torch.equal(gate.executed, parts[index].gates[name].executed), name
                assert torch.allclose(gate.score, parts[index].gates[name].score, atol=1e-5), name


def test_eval_is_deterministic_and_leaves_the_network_alone(network: DynamicNetwork) -> None:
    before = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        first, second = network(sample()).logits, network(sample()).logits
        network(sample(), "skipped")
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())


def test_an_attack_raises_the_flops(network: DynamicNetwork, ledger: FlopsLedger) -> None:
    images = sample()
    with torch.no_grad():
        clean = ledger(network(images, "skipped").gates)
    for attack in (ProjectedAttack(HingeLoss(), space=L2Ball(4.0), steps=12), EnergyAttack(gamma=0.0, steps=12, lr=0.05, keep="best")):
        adversarial = attack(network, images, ledger=ledger).images
        with torch.no_grad():
            spent = ledger(network(adversarial, "skipped").gates)
        assert spent.mean() > clean.mean(), attack
        assert bool((spent >= clean).all()), attack


def test_skipping_works_while_the_network_is_under_attack(network: DynamicNetwork, ledger: FlopsLedger) -> None:
    # The searches and the ensemble judge their images by a pass that skips, while BatchNorm is folded away.
    with torch.no_grad():
        before = network(sample(), "skipped")
    with under_attack(network), torch.no_grad():
        during = network(sample(), "skipped")
        # Folding changes last digits, and with them a decision that stood on its threshold.
        same = torch.stack([(during.gates[name].executed == gate.executed).all(1) for name, gate in before.gates.items()]).all(0)
        assert same.float().mean() > 0.8
        torch.testing.assert_close(during.logits[same], before.logits[same], rtol=1e-4, atol=1e-4)
    spent = SquareSearch(space=LinfBall(0.1), steps=2)(network, sample(), ledger=ledger).images
    with torch.no_grad():
        assert bool((ledger(network(spent, "skipped").gates) >= ledger(before.gates)).all())


def test_autocast_leaves_scores_in_float32(network: DynamicNetwork) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert {gate.score.dtype for gate in network(sample()[:2]).gates.values()} == {torch.float32}


def test_training_steps_lower_the_loss(family: str) -> None:
    network, objective = settled(family).train(), OBJECTIVES[family]()
    ledger, labels = price(network, sample()[:1]), torch.arange(12) % 10
    if family == "skipnet-hrl":
        pytest.skip("its loss holds returns, which are no measure of progress; tests/objectives checks its gradient")
    optimizer = torch.optim.AdamW([parameter for parameter in network.parameters() if parameter.requires_grad], 3e-3)
    losses = []
    objective.progress = 0.5  # a schedule would move the loss by itself
    for step in range(12):
        torch.manual_seed(step)
        terms = objective(network(sample()), labels, ledger)
        assert all(term.ndim == 0 and bool(torch.isfinite(term)) for term in terms.values())
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        losses.append(sum(term.item() for term in terms.values()))
    assert min(losses[-3:]) < losses[0], losses


def test_a_saved_network_comes_back_to_the_last_bit(network: DynamicNetwork, tmp_path: Path) -> None:
    save(network, tmp_path / "saved.safetensors", card={})
    again = load(tmp_path / "saved.safetensors").eval()
    with torch.no_grad():
        mine, loaded = network(sample()), again(sample())
    assert torch.equal(mine.logits, loaded.logits)
    assert torch.equal(gate_table(mine.gates).score, gate_table(loaded.gates).score)


def test_a_split_output_is_its_parts(network: DynamicNetwork) -> None:
    with torch.no_grad():
        whole: DynamicOutput = network(sample())
    first, second = split_output(whole, [5, 7])
    assert torch.equal(torch.cat([gate_table(first.gates).score, gate_table(second.gates).score]), gate_table(whole.gates).score)
    assert all(len(value) == 7 for value in second.aux.values())
