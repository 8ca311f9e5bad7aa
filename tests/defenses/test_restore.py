"""What a record says of a defense is enough to build it again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.zoo import sample, settled

from gatewatt.defenses import JPEG, BitDepth, BudgetGuard, Defended, FixedRoute, MedianFilter, ReservingGuard, behind, described, restored
from gatewatt.gating import DynamicNetwork
from gatewatt.networks.checkpoint import save


def test_every_defense_is_what_its_description_builds() -> None:
    network: DynamicNetwork = settled("skipnet")
    targets = [
        network,
        Defended(network, JPEG(40)),
        Defended(network, MedianFilter(5)),
        Defended(network, BitDepth(2)),
        BudgetGuard(network, 0.8, pace=0.5),
        ReservingGuard(network, 0.8, ["block2"]),
        Defended(BudgetGuard(network, 0.8), JPEG(60)),
    ]
    for target in targets:
        again = behind(network, described(target))
        assert described(again) == described(target)
        assert type(again) is type(target)
        with torch.no_grad():
            assert torch.equal(again(sample()).logits, target(sample()).logits)
    # Last, for a route changes how the network inside decides.
    route = FixedRoute(network, ["block2"])
    assert described(behind(network, described(route))) == {"name": "FixedRoute", "open_gates": ["block2"]}


def test_a_checkpoint_comes_back_behind_its_defense(tmp_path: Path) -> None:
    network: DynamicNetwork = settled("skipnet")
    for defense in (None, BudgetGuard(network, 0.8, pace=0.5), Defended(network, JPEG(40))):
        save(network, tmp_path / "some.safetensors", card={"defense": None if defense is None else described(defense)}, overwrite=True)
        again = restored(tmp_path / "some.safetensors")
        assert not again.training
        assert type(again) is type(defense or network)
        assert described(again) == (None if defense is None else described(defense))
        with torch.no_grad():
            assert torch.equal(again(sample()).logits, (defense or network)(sample()).logits)


def test_an_unknown_defense_is_refused() -> None:
    with pytest.raises(ValueError, match="defense 'Prayer' is not one that can be built again: FixedRoute"):
        behind(settled("skipnet"), {"name": "Prayer"})
