"""What a record says of a defense is enough to build it again."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.zoo import sample, settled

from gatewatt.defenses import JPEG, BitDepth, BudgetGuard, Defended, FixedRoute, MedianFilter, described
from gatewatt.defenses.restore import behind
from gatewatt.gating import DynamicNetwork


def test_every_defense_is_what_its_description_builds() -> None:
    network: DynamicNetwork = settled("skipnet")
    targets = [
        network,
        Defended(network, JPEG(40)),
        Defended(network, MedianFilter(5)),
        Defended(network, BitDepth(2)),
        BudgetGuard(network, 0.8, pace=0.5),
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


def test_an_unknown_defense_is_refused() -> None:
    with pytest.raises(ValueError, match="defense 'Prayer' is not one that can be built again: FixedRoute"):
        behind(settled("skipnet"), {"name": "Prayer"})
