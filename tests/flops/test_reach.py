"""The most that an image can cost behind a guard, against every pattern of gates."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from gatewatt.defenses import BudgetGuard
from gatewatt.flops import price, reach, within_reach
from gatewatt.gating import forced
from gatewatt.networks import SACT, ShallowDeep, SkipNet


@pytest.mark.parametrize("budget", [0.5, 0.661, 0.9])
def test_behind_a_guard_it_is_the_most_of_all_patterns(budget: float, images: Tensor) -> None:
    inner = SkipNet(depth=14, width=4).eval()
    guarded = BudgetGuard(inner, budget)
    ledger = price(guarded, images[:1])
    within = within_reach(guarded, ledger, images[:1])
    assert within_reach(inner, ledger, images[:1]) is ledger
    names = list(inner(images[:1]).gates)
    # Every pattern of five gates, and what the guard leaves of it.
    patterns = torch.tensor(list(product([0.0, 1.0], repeat=len(names))))
    pixels = images[:1].expand(len(patterns), -1, -1, -1)
    with torch.no_grad(), forced(inner, {name: patterns[:, [index]] for index, name in enumerate(names)}):
        spent = ledger(guarded(pixels, "skipped").gates)
    assert spent.max().item() == within.dense <= guarded.certificate <= budget * ledger.dense


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.77, 0.99, 1.0])
def test_the_most_that_exits_can_cost_ends_at_one_of_them(budget: float, images: Tensor) -> None:
    network = ShallowDeep("resnet-20", width=4).eval()
    ledger = price(network, images[:1])
    reach = [ledger.fixed + sum(list(ledger.prices.values())[:count]) for count in range(len(ledger.prices) + 1)]
    found = within_reach(BudgetGuard(network, budget), ledger, images[:1])
    assert found.dense == max(cost for cost in reach if cost <= budget * ledger.dense)


def test_a_cap_stays_as_it_is_where_sums_are_not_formed(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    network = SACT(depth=20, width=4).eval()
    guarded = BudgetGuard(network, 0.8)
    assert within_reach(guarded, price(network, images[:1]), images[:1]).dense == guarded.certificate
    blocks = SkipNet(depth=14, width=4).eval()
    guarded = BudgetGuard(blocks, 0.661)
    assert within_reach(guarded, price(blocks, images[:1]), images[:1]).dense < guarded.certificate
    monkeypatch.setattr(reach, "SUMS", 1)
    assert within_reach(guarded, price(blocks, images[:1]), images[:1]).dense == guarded.certificate
