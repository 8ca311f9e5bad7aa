"""The static comparator: one fixed route through a dynamic network, for every image.

A robust dynamic network matters only if it beats the static network of its own worst-case FLOPs, trained alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewatt.defenses.base import Wrapper, blank_image, decided_by
from gatewatt.defenses.nesting import lies_within
from gatewatt.flops import measuring, price
from gatewatt.gating import (
    Decision,
    DynamicNetwork,
    DynamicOutput,
    Execution,
    Gate,
    check_execution,
    check_images,
    hard,
    measuring_execution,
)
from gatewatt.networks.checkpoint import card_of

OPEN = 0.75  # the score of a gate that is always open; not 1, since losses in logits take its logarithm


class FixedRoute(Wrapper):
    """A network of which some gates are always open and the others gone, whatever the image.

    It reports the open gates alone, with a constant score, so its dense FLOPs are its route's. No image costs more or less: an attack finds
    nothing to follow, and recovery is undefined (0 of 0). Closed modules and what computed the decisions take no gradient; the latter still
    run and are counted, so a static network written from scratch would save ``ledger.overhead`` more.

    Args:
        network: the network whose route is fixed; its decision becomes ``hard``.
        open_gates: names of the gates that stay open; or a checkpoint of a static network, whose card names them.
        size: side of the images in pixels, to try the route on.

    Raises:
        ValueError: for an unknown gate, no gate, one that a closed gate keeps from running, or a checkpoint whose card names no route.

    Example:
        >>> from gatewatt.networks import SkipNet
        >>> route = FixedRoute(SkipNet(14, width=4), ["block1", "block4"])
        >>> list(route(torch.rand(2, 3, 32, 32)).gates)
        ['block1', 'block4']
    """

    def __init__(self, network: DynamicNetwork, open_gates: Sequence[str] | str, *, size: int = 32) -> None:
        super().__init__(network)
        self.open_gates, self.decision = gates_named(open_gates, "the gates that stay open"), hard
        image = blank_image(network, size)
        with measuring(network):
            gates = network(image, "dense").gates
        deciding = [name for name, gate in gates.items() if gate.follows is None]
        unknown = [name for name in self.open_gates if name not in deciding]
        if unknown or not self.open_gates:
            raise ValueError(f"open_gates must name gates of the network ({', '.join(deciding)}), got {', '.join(unknown) or 'none'}")
        # Beside the gates themselves, those that follow them.
        self.live = frozenset(name for name, gate in gates.items() if (gate.follows or name) in self.open_gates)
        gone = [charge.module for charge in self.charges if not self.live.issuperset(charge.gates)]
        for module in (*gone, *self.overhead):
            self.get_submodule(module).requires_grad_(False)
        self.charges = tuple(charge for charge in self.charges if charge.module not in gone)
        with measuring(network):
            stopped = [name for name, gate in self(image, "dense").gates.items() if not bool(gate.executed.all())]
        if stopped:
            raise ValueError(f"gate {stopped[0]!r} cannot stay open: a closed gate before it ends the route")

    @property
    def settings(self) -> dict[str, Any]:
        """Name and route."""
        return {"name": "FixedRoute", "open_gates": list(self.open_gates)}

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """The route. Closed modules never run, in masked execution neither: there is nothing that could open them."""
        check_execution(execution)
        with decided_by(self.network, Route(self.open_gates, hard if execution == "dense" else self.decision)):
            output = self.network(images, measuring_execution(self.network))
        # A slope of zero rather than none: an attack runs and finds that nothing moves, and a trace sees that the scores were computed.
        score = OPEN + 0 * torch.stack([gate.score.mean(1) for gate in output.gates.values()]).sum(0)[:, None]
        gates = {
            name: Gate(score.expand_as(gate.score), score.new_full((), 0.5), gate.executed, gate.follows)
            for name, gate in output.gates.items()
            if name in self.live
        }
        return output._replace(gates=gates)


class Route:
    """Decisions that are the same for every image.

    Args:
        open_gates: names of the gates that may open; all others stay closed.
        own: decides on the constant score of those; hard decisions open them, dictated ones are obeyed.
    """

    def __init__(self, open_gates: Sequence[str], own: Decision) -> None:
        self.open_gates, self.own = open_gates, own

    def __call__(self, name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
        """0 or 1 of shape (B, U)."""
        if name not in self.open_gates:
            return torch.zeros_like(score)
        return self.own(name, torch.full_like(score, OPEN), score.new_full((), 0.5), training=training)


def route_of(checkpoint: str | Path) -> tuple[str, ...] | None:
    """The route that the card of a checkpoint names; None for a network that is not static.

    Args:
        checkpoint: as for :func:`gatewatt.networks.checkpoint.load`; the weights are not opened.
    """
    defense = card_of(checkpoint).get("defense") or {}
    return tuple(defense["open_gates"]) if defense.get("name") == "FixedRoute" else None


def gates_named(given: Sequence[str] | str, what: str) -> tuple[str, ...]:
    """Names of gates: as they are given, or the route of a checkpoint of a static network.

    Args:
        given: names, or a checkpoint.
        what: the names are of, for the message.

    Raises:
        ValueError: for a checkpoint whose card names no route.
    """
    route = route_of(given) if isinstance(given, str) else tuple(given)
    if route is None:
        raise ValueError(f"{given} is of no static network: its card names no route; give {what}")
    return route


def busiest_route(network: DynamicNetwork, images: Tensor, budget: float) -> tuple[str, ...]:
    """The route of the gates used most on ``images`` that costs at most ``budget``: the static network of those FLOPs to compare with.

    Args:
        network: the dynamic network.
        images: clean images (B, 3, H, W) in [0, 1], square; usage is a mean over them and over a gate's units.
        budget: share of the dense FLOPs, in (0, 1], such as the network's own clean or worst-case share.

    Returns:
        Names of the gates in execution order, for :class:`FixedRoute`.

    Raises:
        ValueError: if not even one gate fits.
    """
    check_images(images)
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1], a share of the dense FLOPs, got {budget}")
    ledger, within = price(network, images[:1]), lies_within(network, images.shape[-1])
    with measuring(network):
        gates = network(images, measuring_execution(network)).gates
    usage = {name: gates[name].executed.mean().item() for name in within}

    def cost(route: set[str]) -> float:
        paid = [charge.module for charge in ledger.charges if all((gates[gate].follows or gate) in route for gate in charge.gates)]
        return ledger.fixed + sum(ledger.prices[module] for module in paid)

    route: set[str] = set()
    for name in sorted(within, key=lambda name: -usage[name]):
        if route.issuperset(within[name]) and cost(route | {name}) <= budget * ledger.dense:
            route.add(name)
    if not route:
        raise ValueError(f"budget {budget:g} has room for no gate beside the {ledger.fixed / ledger.dense:.4f} of the dense FLOPs that always run")
    return tuple(name for name in within if name in route)
