"""The defense of a record or a card, built again, the inverse of :func:`~gatewatt.defenses.described`; and a checkpoint behind its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gatewatt.defenses.base import Defended, InputDefense
from gatewatt.defenses.bits import BitDepth
from gatewatt.defenses.guard import BudgetGuard
from gatewatt.defenses.jpeg import JPEG
from gatewatt.defenses.reserve import ReservingGuard
from gatewatt.defenses.route import FixedRoute
from gatewatt.defenses.smoothing import MedianFilter
from gatewatt.gating import DynamicNetwork
from gatewatt.networks.checkpoint import card_of, load

TRANSFORMS: dict[str, type[InputDefense]] = {kind.__name__: kind for kind in (BitDepth, JPEG, MedianFilter)}


def behind(network: DynamicNetwork, defense: Mapping[str, Any] | None, *, size: int = 32) -> DynamicNetwork:
    """The network behind the defense that a summary or the card of a checkpoint describes; without one, the network itself.

    A checkpoint holds the weights of the network inside; :func:`restored` puts it back behind what it was trained behind.

    Args:
        network: the network inside.
        defense: what :func:`~gatewatt.defenses.described` said; of several the outermost comes first.
        size: side of the images in pixels, for defenses that hold for one size.

    Raises:
        ValueError: for a defense that is none of :mod:`gatewatt.defenses`.

    Example:
        >>> from gatewatt.defenses import described
        >>> from gatewatt.networks import SkipNet
        >>> described(behind(SkipNet(8, width=4), {"name": "JPEG", "quality": 50}))
        {'name': 'JPEG', 'quality': 50}
    """
    parts = [] if defense is None else defense.get("parts", [defense])
    for part in reversed(parts):
        name = part["name"]
        if name == "FixedRoute":
            network = FixedRoute(network, part["open_gates"], size=size)
        elif name == "BudgetGuard":
            network = BudgetGuard(network, part["budget"], pace=part["pace"], size=size)
        elif name == "ReservingGuard":
            network = ReservingGuard(network, part["budget"], part["reserved"], size=size)
        elif name in TRANSFORMS:
            network = Defended(network, TRANSFORMS[name](**{key: value for key, value in part.items() if key != "name"}))
        else:
            raise ValueError(f"defense {name!r} is not one that can be built again: FixedRoute, BudgetGuard, ReservingGuard, {', '.join(TRANSFORMS)}")
    return network


def restored(checkpoint: str | Path) -> DynamicNetwork:
    """The network of a checkpoint behind the defense that it was trained behind, in eval mode; without one, :func:`gatewatt.load`'s.

    Args:
        checkpoint: a shipped name, or the path of a ``.safetensors`` file with its card beside it.

    Raises:
        ValueError: for a damaged file, or a defense that is none of :mod:`gatewatt.defenses`.
        FileNotFoundError: if there is none.

    Example:
        >>> type(restored("skipnet-20-digits")).__name__  # its card names no defense
        'SkipNet'
    """
    card = card_of(checkpoint)
    size = card.get("size")
    return behind(load(checkpoint), card.get("defense"), size=size if isinstance(size, int) else 32).eval()
