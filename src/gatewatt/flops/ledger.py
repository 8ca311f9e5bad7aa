"""FLOPs of each image: a price list times the usage of the gates.

Ledger law: FLOPs(x) = fixed + sum over charges of price(module) times the product, over the charge's gates, of the share of its units that x
executed. Per image and in float64: float32 is inexact above 16.8 MFLOPs. 1 MAC = 1 FLOP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gatewatt.gating import Charge, Gate, require_gates


@dataclass(frozen=True)
class FlopsLedger:
    """The price list of one network at one resolution; made by :func:`gatewatt.flops.price`.

    Attributes:
        prices: MACs of each charged module, dense, for one image.
        charges: which gates multiply which price.
        dense: MACs of one image with every gate open.
        fixed: MACs that no gate can save, the gates' own included.
        overhead: MACs of the gates themselves (part of ``fixed``).
        resolution: (H, W) of the images it holds for.
        units: gate -> number U of its units at that resolution.
    """

    prices: Mapping[str, float]
    charges: tuple[Charge, ...]
    dense: float
    fixed: float
    overhead: float
    resolution: tuple[int, int]
    units: Mapping[str, int]

    def __call__(self, gates: Mapping[str, Gate]) -> Tensor:
        """MACs that each image executed, shape (B,), float64.

        Raises:
            ValueError: if the network returned no gates.
            KeyError: if a charged gate is missing.
        """
        require_gates(gates)
        return self._law({name: (gate.executed.sum(1, dtype=torch.float64), gate.executed.shape[1]) for name, gate in gates.items()})

    def surrogate(self, gates: Mapping[str, Gate]) -> Tensor:
        """MACs of the decisions ``score >= threshold`` with the gradient of the scores, shape (B,), float64.

        The straight-through form of the ledger law, for compute targets in training. A gate within others counts as the product along the
        chain: an image that left at an exit pays for no later one, and opening that exit buys the later ones that are open.

        Raises:
            ValueError: if the network returned no gates.
            KeyError: if a charged gate, or one that another lies within, is missing.
        """
        require_gates(gates)
        decided = {name: gate.open.double() + (gate.score - gate.score.detach()).double() for name, gate in gates.items()}
        counts = {}
        for name, gate in gates.items():
            running = decided[name]
            for outer in gate.within:
                running = running * decided[outer]
            counts[name] = (running.sum(1), running.shape[1])
        return self._law(counts)

    def per_gate(self, gates: Mapping[str, Gate]) -> dict[str, Tensor]:
        """MACs charged to each gate, (B,) float64; a charge of several gates is booked on the last one, which completes it."""
        require_gates(gates)
        usage = {name: (gate.executed.sum(1, dtype=torch.float64), gate.executed.shape[1]) for name, gate in gates.items()}
        booked = {name: torch.zeros_like(count) for name, (count, _) in usage.items()}
        for charge in self.charges:
            booked[charge.gates[-1]] = booked[charge.gates[-1]] + self._charged(charge, usage)
        return booked

    def weights(self, gates: Mapping[str, Gate]) -> Tensor:
        """Share lambda of each unit in what all units together can save (Sec. 4.4), shape (N,), float64, sum 1.

        A unit's cost is the derivative of the ledger law at full width: price x how often the gate is named / units, what a gate that
        follows it costs included, what only lies within it not. Order of :func:`gatewatt.gating.gate_table`.
        """
        require_gates(gates)
        cost = {name: 0.0 for name, gate in gates.items() if gate.follows is None}
        for charge in self.charges:
            for name, times in Counter(charge.gates).items():
                cost[gates[name].follows or name] += self.prices[charge.module] * times / gates[name].score.shape[1]
        device = next(iter(gates.values())).score.device
        shares = [torch.full((gates[name].score.shape[1],), each, dtype=torch.float64, device=device) for name, each in cost.items()]
        units = torch.cat(shares)
        return units / units.sum()

    def _law(self, usage: Mapping[str, tuple[Tensor, int]]) -> Tensor:
        return self.fixed + torch.stack([self._charged(charge, usage) for charge in self.charges]).sum(0)

    def _charged(self, charge: Charge, usage: Mapping[str, tuple[Tensor, int]]) -> Tensor:
        counts, units = torch.tensor(self.prices[charge.module], dtype=torch.float64), 1
        for name in charge.gates:
            if name not in usage:
                raise KeyError(f"module {charge.module!r} is charged to gate {name!r}, which the network did not return")
            counts, units = counts * usage[name][0], units * usage[name][1]
        # Multiply first, divide last: whole numbers of MACs stay whole.
        return counts / units
