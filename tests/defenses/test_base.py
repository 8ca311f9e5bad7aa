"""A wrapped network: the weights, decisions and description of the one inside."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gatewatt.defenses import JPEG, BitDepth, BudgetGuard, Defended, FixedRoute, Wrapper, bare, described
from gatewatt.gating import forced, hard
from gatewatt.networks import SkipNet
from gatewatt.networks.checkpoint import load_weights, save


def wrapped(seed: int) -> list[Wrapper]:
    torch.manual_seed(seed)
    networks = [SkipNet(8, width=4).eval() for _ in range(4)]
    return [
        Defended(networks[0], JPEG()),
        BudgetGuard(networks[1], 0.8),
        FixedRoute(networks[2], ["block2"]),
        BudgetGuard(Defended(Defended(networks[3], JPEG()), BitDepth()), 0.8),
    ]


KINDS = range(4)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_move_between_a_network_and_its_defended_twin(kind: int, tmp_path: Path) -> None:
    defended, other = wrapped(1)[kind], wrapped(2)[kind]
    inner = bare(defended)
    assert type(inner) is SkipNet
    assert defended.state_dict().keys() == inner.state_dict().keys()
    save(inner, tmp_path / "inner.safetensors", card={})
    load_weights(other, tmp_path / "inner.safetensors")
    assert all(torch.equal(tensor, bare(other).state_dict()[name]) for name, tensor in inner.state_dict().items())
    plain = SkipNet(8, width=4)
    plain.load_state_dict(defended.state_dict())
    assert all(torch.equal(tensor, plain.state_dict()[name]) for name, tensor in inner.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_loads_weights_it_saved_with_or_without_the_defense(kind: int) -> None:
    def task(network: nn.Module) -> nn.Module:
        return nn.ModuleDict({"network": network, "other": nn.Linear(1, 1)})

    saved, defended = task(SkipNet(8, width=4)).state_dict(), task(wrapped(2)[kind])
    before = {name: tensor.clone() for name, tensor in saved.items()}
    defended.load_state_dict(saved)
    assert saved.keys() == before.keys()
    assert defended.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in defended.state_dict().items())
    again = copy.deepcopy(defended)
    assert again.state_dict().keys() == saved.keys()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        defended.load_state_dict({**saved, "network.nothing": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        defended.load_state_dict({name: tensor for name, tensor in saved.items() if "stem" not in name})


def test_decisions_reach_the_network_inside(images: Tensor) -> None:
    defended = wrapped(1)[0]
    pattern = {"block1": torch.tensor([[1.0], [0.0]]), "block2": torch.tensor([[0.0], [1.0]])}
    with forced(defended, pattern):
        gates = defended(images[:2]).gates
    assert {name: gate.executed.tolist() for name, gate in gates.items()} == {name: decided.tolist() for name, decided in pattern.items()}
    defended.decision = hard
    assert bare(defended).decision is hard


def test_what_is_described_is_the_defense_alone() -> None:
    networks = wrapped(1)
    assert described(bare(networks[0])) is None
    assert described(networks[0]) == {"name": "JPEG", "quality": 75}
    assert described(networks[2]) == {"name": "FixedRoute", "open_gates": ["block2"]}
    stacked = described(networks[3])
    assert stacked is not None
    assert stacked["name"] == "BudgetGuard + BitDepth + JPEG"
    assert stacked["parts"][1:] == [{"name": "BitDepth", "bits": 4}, {"name": "JPEG", "quality": 75}]
    assert all(network.arguments == bare(network).arguments for network in networks)


def test_the_outer_transform_comes_first(images: Tensor) -> None:
    torch.manual_seed(1)
    network = SkipNet(8, width=4).eval()
    defended = Defended(Defended(network, BitDepth(2)), JPEG(30))
    with torch.no_grad():
        assert torch.equal(defended(images).logits, network(BitDepth(2)(JPEG(30)(images))).logits)
