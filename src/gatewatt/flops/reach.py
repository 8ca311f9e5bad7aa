"""The most that an image can cost: everything, or what a guard lets through."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gatewatt.flops.ledger import FlopsLedger
from gatewatt.gating import DynamicNetwork, measuring_execution

SUMS = 100_000
"""How many different sums of prices are formed at most."""


def within_reach(network: DynamicNetwork, ledger: FlopsLedger, image: Tensor) -> FlopsLedger:
    """The price list with ``dense`` lowered to what an image can cost at most, where the network has a ``certificate`` (MACs).

    A cap lies between two costs as a rule: the most is the largest sum of prices below it, of gates that lie within open ones. With gates of many
    units, charges of several gates, or more different sums than :data:`SUMS` it is the cap itself; images that cannot reach that are attacked to
    the end.

    Args:
        network: behind a guard or not.
        ledger: its prices.
        image: any, (1, 3, H, W), to see which gates lie within which.
    """
    certificate: float | None = getattr(network, "certificate", None)
    if certificate is None:
        return ledger
    room = certificate - ledger.fixed
    own = dict.fromkeys(ledger.units, 0.0)
    for module, names in ledger.charges:
        own[names[0]] += ledger.prices[module]
        if len(names) > 1 or ledger.units[names[0]] > 1:
            return replace(ledger, dense=min(ledger.dense, certificate))
    with torch.no_grad():
        within = {name: frozenset(gate.within) for name, gate in network(image, measuring_execution(network)).gates.items()}
    outer = frozenset().union(*within.values())
    # What was spent, and which of the gates that others lie within are open.
    states = {(0.0, frozenset[str]())}
    for name, price in own.items():
        opened = frozenset([name]) & outer
        states |= {(total + price, around | opened) for total, around in states if within[name] <= around and total + price <= room}
        if len(states) > SUMS:
            return replace(ledger, dense=min(ledger.dense, certificate))
    return replace(ledger, dense=min(ledger.dense, ledger.fixed + max(total for total, _ in states)))
