"""How far what a gate lets through reaches into the gates that follow it: found by dictating masks and seeing what runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.defenses.base import blank_image
from gatewatt.flops import measuring
from gatewatt.gating import DynamicNetwork, forced, measuring_execution

GROUPS = 32
"""Masks that hold every unit once between them, each among few others."""
CROWDS = 8
"""Masks of half, a quarter, an eighth ... of the units."""


class Reach:
    """From when on the units of a follower run, at the earliest, where those of the gate that it follows are opened one after the other.

    Args:
        radius: the units are a square map, and each reaches the neighbours up to so many steps away; None for one that reaches every unit.

    Example:
        >>> places = torch.arange(9.0)[None]
        >>> [Reach(radius)(places).int().tolist()[0] for radius in (0, 1, None)]
        [[0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 1, 0, 0, 1, 3, 3, 4], [0, 0, 0, 0, 0, 0, 0, 0, 0]]
    """

    def __init__(self, radius: int | None) -> None:
        self.radius = radius

    def __call__(self, places: Tensor) -> Tensor:
        """The place of every unit of the follower, for those of its gate's: (B, U) both, floating point."""
        if self.radius is None:
            return places.amin(1, keepdim=True).expand_as(places)
        if self.radius == 0:
            return places
        side = isqrt(places.shape[1])
        return -functional.max_pool2d(-places.view(-1, 1, side, side), 2 * self.radius + 1, 1, self.radius).flatten(1)

    def covers(self, mask: Tensor, ran: Tensor) -> bool:
        """Whether nothing ran (B, U) beyond what a mask (B, U) reaches."""
        if self.radius and isqrt(mask.shape[1]) ** 2 != mask.shape[1]:
            return False
        return not bool(torch.logical_and(ran, self((~mask).float()) > 0).any())


REACHES = (Reach(0), Reach(1), Reach(2), Reach(3), Reach(None))
"""From the narrowest on."""


def reaches(network: DynamicNetwork, size: int) -> dict[str, Reach]:
    """Every gate that follows another -> the narrowest of :data:`REACHES` that holds all of it that ran, under every mask dictated.

    What reaches further than that under no mask tried, yet does under another, would go unnoticed: each unit is seen among few others, and in crowds.

    Args:
        network: its decisions must obey what is dictated.
        size: side of the images in pixels.

    Raises:
        ValueError: if a follower runs where nothing does of the gate that it follows.
    """
    image = blank_image(network, size)
    with measuring(network):
        gates = network(image, "dense").gates
        followers = {name: gate.follows for name, gate in gates.items() if gate.follows is not None}
        found = dict.fromkeys(followers, 0)
        if not followers:
            return {}
        for dictated in patterns({name: gate.score.shape[1] for name, gate in gates.items() if gate.follows is None}):
            masks = {name: mask.to(image.device) for name, mask in dictated.items()}
            with forced(network, masks):
                ran = {name: gate.executed > 0 for name, gate in network(image, measuring_execution(network)).gates.items()}
            for name, leader in followers.items():
                while found[name] < len(REACHES) and not REACHES[found[name]].covers(ran[leader], ran[name]):
                    found[name] += 1
                if found[name] == len(REACHES):
                    raise ValueError(f"gate {name!r} follows {leader!r} and runs where nothing of it does: what it costs has no bound")
    return {name: REACHES[index] for name, index in found.items()}


def patterns(units: Mapping[str, int]) -> Iterator[dict[str, Tensor]]:
    """Masks (1, U) for every gate, gates of as many units alike: positions that have halted stay halted, a block within a block is open."""
    generator = torch.Generator().manual_seed(0)
    order = {count: torch.randperm(count, generator=generator) for count in sorted(set(units.values()))}
    for group in range(GROUPS):
        yield {name: (order[count] % GROUPS == group)[None].float() if count > 1 else torch.ones(1, 1) for name, count in units.items()}
    for crowd in range(CROWDS):
        drawn = {count: (torch.rand(1, count, generator=generator) < 0.5 ** (crowd + 1)).float() for count in order}
        yield {name: drawn[count] if count > 1 else torch.ones(1, 1) for name, count in units.items()}
