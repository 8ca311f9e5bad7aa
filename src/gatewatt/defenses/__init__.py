"""Defenses: transforms before a network, a cap on what it may spend, the static network it must beat; and what training against attacks keeps.

At inference each is a network around a network (:class:`Wrapper`), so attacks, ledgers and tasks meet nothing new.
"""

from gatewatt.defenses.base import Defended, InputDefense, Wrapper, bare, described
from gatewatt.defenses.bits import BitDepth
from gatewatt.defenses.cache import Crops, PerturbationCache
from gatewatt.defenses.guard import BudgetGuard
from gatewatt.defenses.jpeg import JPEG
from gatewatt.defenses.reserve import ReservingGuard
from gatewatt.defenses.restore import behind, restored
from gatewatt.defenses.route import FixedRoute, busiest_route
from gatewatt.defenses.smoothing import MedianFilter

__all__ = [
    "JPEG",
    "BitDepth",
    "BudgetGuard",
    "Crops",
    "Defended",
    "FixedRoute",
    "InputDefense",
    "MedianFilter",
    "PerturbationCache",
    "ReservingGuard",
    "Wrapper",
    "bare",
    "behind",
    "busiest_route",
    "described",
    "restored",
]
