"""gatewatt: train dynamic neural networks, attack their efficiency, defend it, and measure what really ran.

The names below are loaded when first used, so that importing gatewatt costs nothing and never imports lightning.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewatt import attacks, defenses, networks
    from gatewatt.diagnosis import doctor
    from gatewatt.flops import FlopsLedger, audit, price
    from gatewatt.gating import GateHook, HookedNetwork
    from gatewatt.networks.checkpoint import load

try:
    __version__ = version("gatewatt")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

_HOMES = {
    "FlopsLedger": "gatewatt.flops",
    "GateHook": "gatewatt.gating",
    "HookedNetwork": "gatewatt.gating",
    "audit": "gatewatt.flops",
    "doctor": "gatewatt.diagnosis",
    "load": "gatewatt.networks.checkpoint",
    "price": "gatewatt.flops",
}
_MODULES = ("attacks", "defenses", "networks")

__all__ = ["FlopsLedger", "GateHook", "HookedNetwork", "__version__", "attacks", "audit", "defenses", "doctor", "load", "networks", "price"]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"gatewatt.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gatewatt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
