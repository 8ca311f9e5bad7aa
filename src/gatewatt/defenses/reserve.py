"""A budget guard that keeps room for the gates that matter most, wherever in the network they come.

:class:`~gatewatt.defenses.BudgetGuard` serves gates as they come, and an image that asks for much loses its last layers, those that classify. Here
some gates are reserved for: whatever comes before them is served from what is left over. What closes first is then what clean images can best do
without, not what happens to come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gatewatt.defenses.guard import BudgetGuard, Plan
from gatewatt.defenses.route import gates_named
from gatewatt.gating import DynamicNetwork


class ReservingGuard(BudgetGuard):
    """A network that spends at most a share of its dense FLOPs on any image, and that always can afford some of its gates.

    A reserved gate that asks for computation gets it, whatever an image asked for before; one that does not ask leaves its share to the gates after
    it. Gates that are not reserved may open as far as the rest goes, in the order in which they run. The certificate is that of
    :class:`~gatewatt.defenses.BudgetGuard`.

    Args:
        network: the network to guard.
        budget: the cap, as a share of the dense FLOPs, in (0, 1].
        reserved: names of gates; :func:`~gatewatt.defenses.busiest_route` with the same budget gives those that images use most and that fit
            into it, where no module is charged to two gates (ManiDP: give it less). Or a checkpoint of a static network, whose card names its route.
        size: side of the images in pixels, for which prices and the cap hold.

    Raises:
        ValueError: as :class:`~gatewatt.defenses.BudgetGuard`; for an unknown gate, none, or more than the budget has room for.

    Example:
        >>> from gatewatt.networks import SkipNet
        >>> guarded = ReservingGuard(SkipNet(14, width=4), 0.6, ["block4", "block5"])
        >>> guarded.certificate <= 0.6 * guarded.plan.ledger.dense
        True
    """

    def __init__(self, network: DynamicNetwork, budget: float, reserved: Sequence[str] | str, *, size: int = 32) -> None:
        super().__init__(network, budget, size=size)
        self.reserved = gates_named(reserved, "the gates that are reserved for")
        self.plan = reserving(self.plan, self.reserved)

    @property
    def settings(self) -> dict[str, Any]:
        """Name, budget, reserved gates and certificate (MACs)."""
        return {"name": "ReservingGuard", "budget": self.budget, "reserved": list(self.reserved), "certificate": self.certificate}


def reserving(plan: Plan, reserved: Sequence[str]) -> Plan:
    """A plan in which every gate leaves what the reserved gates after it cost at most.

    Raises:
        ValueError: for an unknown gate, none, or more than the cap has room for.
    """
    unknown = [name for name in reserved if name not in plan.within]
    if unknown or not reserved:
        raise ValueError(f"reserved must name gates of the network ({', '.join(plan.within)}), got {', '.join(unknown) or 'none'}")
    own = {name: sum(plan.ledger.prices[charge.module] for charge in plan.booked[name]) for name in plan.within}
    later = sum(own[name] for name in set(reserved))
    if plan.ledger.fixed + later > plan.cap:
        raise ValueError(f"the reserved gates cost {plan.ledger.fixed + later:,.0f} MACs with what always runs, and the cap is {plan.cap:,.0f}")
    allowance = {}
    for name in plan.within:
        later -= own[name] if name in reserved else 0.0
        allowance[name] = plan.cap - later
    return replace(plan, allowance=allowance)
