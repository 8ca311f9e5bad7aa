"""What is measured: recovery, distortion, gate usage, and one row per attacked image.

Names load on first use, so that the reading side (``gatewatt.metrics.record``, :mod:`gatewatt.reports`) never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gatewatt.metrics.distortion import linf_levels, mse_levels2, psnr_db, round_to_8bit
    from gatewatt.metrics.estimates import (
        PerImageRecovery,
        RouteStatistics,
        bootstrap_interval,
        recovery_per_image_percent,
        recovery_percent,
        route_statistics,
    )
    from gatewatt.metrics.record import (
        ImageRecord,
        RecordError,
        image_records,
        merge_records,
        read_records,
        summarize,
        write_records,
        write_summary,
    )
    from gatewatt.metrics.recovery import MeanFlops, RecoveryPercent, RecoveryTotals
    from gatewatt.metrics.usage import GateUsage

__all__ = [
    "GateUsage",
    "ImageRecord",
    "MeanFlops",
    "PerImageRecovery",
    "RecordError",
    "RecoveryPercent",
    "RecoveryTotals",
    "RouteStatistics",
    "bootstrap_interval",
    "image_records",
    "linf_levels",
    "merge_records",
    "mse_levels2",
    "psnr_db",
    "read_records",
    "recovery_per_image_percent",
    "recovery_percent",
    "round_to_8bit",
    "route_statistics",
    "summarize",
    "write_records",
    "write_summary",
]

_HOMES = {
    "distortion": ("linf_levels", "mse_levels2", "psnr_db", "round_to_8bit"),
    "estimates": (
        "PerImageRecovery",
        "RouteStatistics",
        "bootstrap_interval",
        "recovery_per_image_percent",
        "recovery_percent",
        "route_statistics",
    ),
    "record": (
        "ImageRecord",
        "RecordError",
        "image_records",
        "merge_records",
        "read_records",
        "summarize",
        "write_records",
        "write_summary",
    ),
    "recovery": ("MeanFlops", "RecoveryPercent", "RecoveryTotals"),
    "usage": ("GateUsage",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
