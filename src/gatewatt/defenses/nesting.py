"""Which gates lie within which: found by closing one and seeing what no longer runs."""

from __future__ import annotations

import torch

from gatewatt.defenses.base import blank_image
from gatewatt.flops import measuring
from gatewatt.gating import DynamicNetwork, forced, measuring_execution


def lies_within(network: DynamicNetwork, size: int) -> dict[str, tuple[str, ...]]:
    """Every deciding gate, in execution order, and the earlier gates it lies within, unit by unit.

    A unit runs only if the same unit of those gates ran: exits after an exit, positions and tokens that stay halted, blocks within a stage.
    A gate of one unit encloses all units of another.

    Args:
        network: its decisions must obey what is dictated.
        size: side of the images in pixels.
    """
    image, execution = blank_image(network, size), measuring_execution(network)
    with measuring(network):
        opened = {name: torch.ones_like(gate.score) for name, gate in network(image, "dense").gates.items() if gate.follows is None}
        within: dict[str, list[str]] = {name: [] for name in opened}
        for position, name in enumerate(opened):
            closed = opened[name].clone()
            closed[:, 0] = 0
            with forced(network, {**opened, name: closed}):
                gates = network(image, execution).gates
            for inner in list(opened)[position + 1 :]:
                executed = gates[inner].executed
                enclosed = not executed.any() if closed.shape[1] == 1 else closed.shape == executed.shape and not executed[0, 0]
                if enclosed:
                    within[inner].append(name)
    return {name: tuple(around) for name, around in within.items()}
