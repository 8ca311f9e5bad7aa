"""A budget guard: a hard cap on what a network may spend on any image, with a certificate.

An attacker who owns every pixel, and every score, cannot make a guarded image cost more; what is left to attack is its accuracy under the cap.

The policy is causal, because skipped execution is: when a gate decides, nobody knows what later gates will ask for. Gates are served in the
order in which they run. A gate may open only as far as what is spent, its own price, and what must run anyway stay within the cap; of a gate
with many units (positions, tokens, channels), which all cost the same, those with the smallest margin over their threshold close first. A
block that does not fit is skipped, an exit that is not affordable to pass is taken, a unit that halts stays halted. So images that cost no
more than the cap by themselves run as they would without a guard (``pace=0``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gatewatt.defenses.base import Wrapper, blank_image, decided_by
from gatewatt.defenses.following import Reach, reaches
from gatewatt.defenses.nesting import lies_within
from gatewatt.flops import FlopsLedger, measuring, price
from gatewatt.gating import Charge, Decision, DynamicNetwork, DynamicOutput, Execution, forced, measuring_execution


@dataclass(frozen=True)
class Plan:
    """What a guard knows of a network before it sees an image.

    Attributes:
        ledger: prices.
        cap: MACs of one image at most, a whole number as all MACs are.
        within: deciding gate -> earlier gates it lies within, in execution order.
        followers: deciding gate -> the gates that follow it, and how far what it lets through reaches into each.
        booked: deciding gate -> charges that are settled once it has decided.
        allowance: deciding gate -> MACs that may be spent up to it, the fixed part included.
    """

    ledger: FlopsLedger
    cap: float
    within: Mapping[str, tuple[str, ...]]
    followers: Mapping[str, Mapping[str, Reach]]
    booked: Mapping[str, tuple[Charge, ...]]
    allowance: Mapping[str, float]


class BudgetGuard(Wrapper):
    """A network that spends at most a share of its dense FLOPs on any image, by construction.

    Units of a gate that others follow (SACT's dilated masks) are charged with what they reach there, which is learned from the network by
    dictating masks (:func:`~gatewatt.defenses.following.reaches`). Dense execution has no cap: it prices the network.

    Args:
        network: the network to guard.
        budget: the cap, as a share of the dense FLOPs, in (0, 1].
        pace: 0 serves gates as they come until nothing is left; 1 lets every gate spend no more than its proportional part of the budget and
            what earlier gates left over, so that an attacked image does not lose all its late layers. In between, in proportion. Meant for
            networks that skip: one that exits would leave early.
        size: side of the images in pixels, for which prices and the cap hold.

    Raises:
        ValueError: for a budget below what always runs, a value out of range, a network whose gates do not obey, or images of another size.

    Example:
        >>> from gatewatt.networks import SkipNet
        >>> guarded = BudgetGuard(SkipNet(8, width=4), 0.7)
        >>> guarded.certificate <= 0.7 * guarded.plan.ledger.dense
        True
    """

    def __init__(self, network: DynamicNetwork, budget: float, *, pace: float = 0.0, size: int = 32) -> None:
        super().__init__(network)
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be in (0, 1], a share of the dense FLOPs, got {budget}")
        if not 0 <= pace <= 1:
            raise ValueError(f"pace must be in [0, 1], got {pace}")
        self.budget, self.pace, self.size = budget, pace, size
        self.plan = plan_for(network, budget, pace, size)

    @property
    def certificate(self) -> float:
        """MACs that no image of this size can exceed, whatever its pixels and scores, in masked and in skipped execution.

        Where gates follow others, as far as their reach was learned right (:func:`~gatewatt.defenses.following.reaches`).
        """
        return self.plan.cap

    @property
    def settings(self) -> dict[str, Any]:
        """Name, budget, pace and certificate (MACs)."""
        return {"name": "BudgetGuard", "budget": self.budget, "pace": self.pace, "certificate": self.certificate}

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """The network, its gates opened as far as the budget goes."""
        if tuple(images.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"this guard is priced for {self.size}x{self.size} images, got {tuple(images.shape)}; set its size")
        with decided_by(self.network, Spending(self.plan, self.network.decision)):
            return self.network(images, execution)


class Spending:
    """The decisions of one guarded forward pass, and what each image has spent so far.

    Args:
        plan: prices, nesting and allowances.
        own: the decision that is asked first; what it closes stays closed.
    """

    def __init__(self, plan: Plan, own: Decision) -> None:
        self.plan, self.own = plan, own
        self.kept: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.spent = torch.tensor(plan.ledger.fixed, dtype=torch.float64)

    def __call__(self, name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
        """What the gate asks for and can afford, 0 or 1 of shape (B, U)."""
        asked = self.own(name, score, threshold, training=training)
        running = asked.detach() > 0
        for around in self.plan.within[name]:
            running = torch.logical_and(running, self.kept[around])
        self.spent = self.spent.to(score.device).expand(len(score))
        places = places_of(running, (score - threshold).detach())
        first = {name: places, **{follower: reach(places) for follower, reach in self.plan.followers[name].items()}}
        count = self._affordable(name, running.sum(1), first)
        self.spent = self.spent + self._book(name, count, first)
        self.kept[name] = kept = places < count[:, None]
        return asked * kept.to(asked.dtype)

    def _affordable(self, name: str, wanted: Tensor, first: Mapping[str, Tensor]) -> Tensor:
        """The largest number of units (B,) up to ``wanted`` (B,) that stays within the allowance, by bisection: cost rises with it."""
        low, high = torch.zeros_like(wanted), wanted
        for _ in range(self.plan.ledger.units[name].bit_length()):
            middle = (low + high + 1) // 2
            fits = self.spent + self._book(name, middle, first) <= self.plan.allowance[name]
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
        return low

    def _book(self, name: str, count: Tensor, first: Mapping[str, Tensor]) -> Tensor:
        """MACs (B,) settled once the gate has decided to run ``count`` (B,) of its units; how many units of what follows run stays on the books.

        Args:
            name: the gate.
            count: the first so many of its units run.
            first: the gate and those that follow it -> for every unit (B, U), the place of the unit with which it runs.
        """
        self.counts |= {gate: (places < count[:, None]).sum(1, dtype=torch.float64) for gate, places in first.items()}
        total = torch.zeros_like(self.counts[name])
        for module, gates in self.plan.booked[name]:
            work, units = total.new_full((), self.plan.ledger.prices[module]), 1
            for gate in gates:
                work, units = work * self.counts[gate], units * self.plan.ledger.units[gate]
            # Multiply first, divide last: whole numbers of MACs stay whole.
            total = total + work / units
        return total


def places_of(running: Tensor, margin: Tensor) -> Tensor:
    """The place (B, U) of every unit, from 0: those running by their margin, the largest first and of equal ones the first, then the others.

    Whole numbers in float32.

    Example:
        >>> places_of(torch.tensor([[True, False, True]]), torch.tensor([[0.1, 0.4, 0.3]])).tolist()
        [[1.0, 2.0, 0.0]]
    """
    order = torch.where(running, margin, torch.full_like(margin, -torch.inf)).sort(dim=1, descending=True, stable=True).indices
    places = torch.arange(running.shape[1], device=running.device, dtype=torch.float32).expand_as(order)
    return torch.zeros_like(places).scatter(1, order, places)


def plan_for(network: DynamicNetwork, budget: float, pace: float, size: int) -> Plan:
    """Price a network, learn its layout, and spread the budget over its gates.

    Raises:
        ValueError: if something that no gate can save costs more than the budget, or gates do not obey what is dictated.
    """
    image = blank_image(network, size)
    ledger, within = price(network, image), lies_within(network, size)
    with measuring(network):
        gates = network(image, "dense").gates
        with forced(network, {name: torch.zeros_like(gates[name].score) for name in within}):
            closed = ledger(network(image, measuring_execution(network)).gates).item()
    if closed != ledger.fixed:
        raise ValueError(f"{type(network).__name__} does not obey dictated decisions (all gates closed, it spends {closed:,.0f} MACs): it has no cap")
    # A thousandth of a MAC forgives the rounding of a share that was worked out to fit exactly.
    cap = float(math.floor(budget * ledger.dense + 1e-3))
    if cap < ledger.fixed:
        raise ValueError(f"budget {budget:g} is below the {ledger.fixed / ledger.dense:.4f} of the dense FLOPs that no gate can save")
    leader = {name: gate.follows for name, gate in gates.items() if gate.follows is not None}
    order, reach = list(within), reaches(network, size)
    followers: dict[str, dict[str, Reach]] = {name: {follower: reach[follower] for follower in leader if leader[follower] == name} for name in order}
    booked: dict[str, list[Charge]] = {name: [] for name in order}
    for charge in ledger.charges:
        # With its last gate undecided a charge may still come to nothing.
        booked[max((leader.get(gate, gate) for gate in charge.gates), key=order.index)].append(charge)
    own = {name: sum(ledger.prices[charge.module] for charge in charges) for name, charges in booked.items()}
    reserve, allowance, later = pace * (cap - ledger.fixed) / sum(own.values()), {}, sum(own.values())
    for name in order:
        later -= own[name]
        allowance[name] = cap - reserve * later
    return Plan(ledger, cap, within, followers, {name: tuple(charges) for name, charges in booked.items()}, allowance)
