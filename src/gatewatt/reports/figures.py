"""Recovery against MSE, as a figure: one line per method, float images solid and 8-bit images dashed.

matplotlib is imported on first use and only with its file backend, so a machine without a display, or a report without figures, works.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from gatewatt.metrics.record import psnr_of_mse
from gatewatt.reports.collect import RANKING, Panel, ReportError

if TYPE_CHECKING:
    from gatewatt.reports.tables import Figures

# Okabe and Ito: told apart by readers with any colour vision; the markers do it again in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def recovery_figure(panel: Panel, figures: dict[str, Figures], path: str | Path) -> Path:
    """Draw recovery % against MSE (log axis, PSNR above it) for every method of a panel.

    Args:
        panel: runs to draw; those that changed nothing or whose recovery is undefined have no place on the axes and are left out.
        figures: run name -> its figures.
        path: where to write; the suffix (``.png``, ``.svg``) chooses the format.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("figures need matplotlib: install it (pip install matplotlib) or ask for a report without figures") from None

    path = Path(path)
    # The object interface leaves pyplot's global state alone; a fixed salt and no date make the same figure twice the same bytes.
    with rc_context({"svg.hashsalt": "gatewatt", "font.size": 9}):
        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawn: list[float] = []
        others = len(RANKING)
        for method, runs in panel.methods.items():
            plain = method == runs[0].attack.name
            # A method of the paper has one colour in every figure; others take what is left in turn.
            rank = RANKING.index(method) if plain and method in RANKING else others
            others += rank == others
            colour, marker = COLOURS[rank % len(COLOURS)], MARKERS[rank % len(MARKERS)]
            found = [figures[run.name] for run in runs]
            points = sorted((one.mse_levels2, one.recovery_percent, one.recovery_low, one.recovery_high) for one in found if _drawable(one))
            rounded = sorted((one.mse_levels2_8bit, one.recovery_8bit_percent) for one in found if one.mse_levels2_8bit > 0 and _drawable(one))
            if points:
                x, y, low, high = zip(*points, strict=True)
                axes.plot(x, y, color=colour, marker=marker, markersize=4, linewidth=1.4, label=method)
                axes.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
                drawn += x
            if rounded:
                x, y = zip(*rounded, strict=True)
                axes.plot(x, y, color=colour, marker=marker, markersize=4, markerfacecolor="white", linewidth=1, linestyle="--")
                drawn += x
        axes.set_xlabel("MSE, squared 8-bit levels (mean over images)")
        axes.set_ylabel("FLOPs recovered, %")
        axes.set_title(panel.title, fontsize=9)
        axes.axhline(0, color="0.6", linewidth=0.6)
        axes.grid(True, linewidth=0.3, alpha=0.6)
        if drawn:
            axes.set_xscale("log")
            margin = 1.3
            axes.set_xlim(min(drawn) / margin, max(drawn) * margin)
            ticks = _psnr_ticks(min(drawn) / margin, max(drawn) * margin)
            above = axes.secondary_xaxis("top")
            above.set_xticks([mse for mse, _ in ticks], [f"{psnr:g}" for _, psnr in ticks])
            above.set_xticks([], minor=True)
            above.set_xlabel("PSNR of the mean MSE, dB")
            axes.legend(title="solid: as attacked, dashed: 8-bit", fontsize=8, title_fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {".svg": {"Date": None}, ".png": {"Software": None}}.get(path.suffix)
        figure.savefig(path, dpi=150, metadata=metadata)
    return path


def _drawable(found: Figures) -> bool:
    return found.mse_levels2 > 0 and math.isfinite(found.recovery_percent)


def _psnr_ticks(low: float, high: float) -> list[tuple[float, float]]:
    """(MSE, PSNR) of round PSNR values between two MSE values, at most about eight."""
    span = psnr_of_mse(low) - psnr_of_mse(high)
    step = next(step for step in (1, 2, 5, 10, 20, 50) if span / step <= 8 or step == 50)
    first, last = math.ceil(psnr_of_mse(high) / step) * step, math.floor(psnr_of_mse(low) / step) * step
    return [(255**2 / 10 ** (psnr / 10), float(psnr)) for psnr in range(first, last + 1, step)]
