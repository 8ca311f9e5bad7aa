"""What a table recipe may have drawn, from records alone: bars, curves over steps, gate usage, FLOPs of each image, and images.

Recovery against MSE is drawn by :mod:`gatewatt.reports.figures`. matplotlib is imported on first use and only with its file backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gatewatt.reports.collect import ReportError, Run
from gatewatt.reports.figures import COLOURS, MARKERS
from gatewatt.reports.measures import Measured

STRIP_FILE = "strip.npz"
"""Name of the file with a row's images."""


class Bar(NamedTuple):
    """One row of a bar chart: our recovery with its interval, and the paper's figure where there is one."""

    label: str
    recovery: Measured
    paper: float | None
    dataset: str


class Curve(NamedTuple):
    """Recovery over a swept setting, in its order."""

    label: str
    x: Sequence[float]
    recovery: Sequence[Measured]


@contextmanager
def drawn(path: Path, width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Axes (rows, columns) of a figure that is written to ``path`` when the block ends; the same content gives the same bytes.

    Raises:
        ReportError: if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ReportError("figures need matplotlib: install it (pip install matplotlib) or ask for a report without figures") from None
    with rc_context({"svg.hashsalt": "gatewatt", "font.size": 9}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure.subplots(rows, columns, squeeze=False, **options)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={".svg": {"Date": None}, ".png": {"Software": None}}.get(path.suffix))


def bars(found: Sequence[Bar], path: Path) -> Path:
    """Recovery of every row with its interval; a hollow diamond is the paper's figure, on the paper's data and network."""
    with drawn(path, 6.4, 1.2 + 0.32 * len(found)) as ((axes,),):
        places = np.arange(len(found))[::-1]
        for place, bar in zip(places, found, strict=True):
            low, high = (abs(end - bar.recovery.value) if np.isfinite(end) else 0.0 for end in (bar.recovery.low, bar.recovery.high))
            axes.barh(place, bar.recovery.value, height=0.6, color=COLOURS[0], alpha=0.8, xerr=[[low], [high]], ecolor="0.2", capsize=2)
            if bar.paper is not None:
                axes.plot(bar.paper, place, marker="D", markersize=6, color=COLOURS[1], markerfacecolor="white", linestyle="none")
                axes.annotate(bar.dataset, (bar.paper, place), xytext=(5, 4), textcoords="offset points", fontsize=6, color="0.3")
        axes.set_yticks(places, [bar.label for bar in found])
        axes.axvline(0, color="0.6", linewidth=0.6)
        axes.set_xlabel("FLOPs recovered, %\nbar: ours; diamond: the paper's,\non its data and network")
    return path


def curves(found: Sequence[Curve], path: Path, xlabel: str = "steps") -> Path:
    """Recovery over a swept setting, one line per row."""
    with drawn(path, 6.4, 4.0) as ((axes,),):
        for index, curve in enumerate(found):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(curve.x, [point.value for point in curve.recovery], color=colour, marker=MARKERS[index % len(MARKERS)], label=curve.label)
            axes.fill_between(curve.x, [point.low for point in curve.recovery], [point.high for point in curve.recovery], color=colour, alpha=0.12)
        axes.set_xlabel(xlabel)
        axes.set_ylabel("FLOPs recovered, %")
        axes.grid(True, linewidth=0.3, alpha=0.6)
        axes.legend(fontsize=8)
    return path


def usage(found: Mapping[str, Run], path: Path, most: int = 100) -> Path:
    """Gate usage maps: a row per image, a column per gate in execution order, black where it ran; clean on the left, attacked on the right.

    Images are sorted by what they cost clean, and the first ``most`` of a run's records are shown. Runs without gate columns (networks with
    thousands of units) have no map.
    """
    shown = {label: run.rows[:most] for label, run in found.items() if run.rows[0].gates_clean}
    with drawn(path, 6.4, 0.6 + 2.2 * len(shown), len(shown), 2) as grid:
        for (label, rows), axes in zip(shown.items(), grid, strict=True):
            ordered = sorted(rows, key=lambda row: (row.flops_clean, row.id))
            for side, name in zip(axes, ("clean", "attacked"), strict=True):
                gates = [row.gates_clean if name == "clean" else row.gates_adversarial for row in ordered]
                pattern = np.array([[int(unit) for unit in text] for text in gates])
                side.imshow(pattern, cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
                side.set_title(f"{label}: {name}, {100 * pattern.mean():.1f} % open", fontsize=8)
                side.set_xlabel("gate")
                side.set_ylabel("image")
    return path


def costs(found: Mapping[str, Run], path: Path) -> Path:
    """FLOPs of the images in ascending order, as a share of dense: dashed clean, solid attacked."""
    with drawn(path, 6.4, 4.0) as ((axes,),):
        for index, (label, run) in enumerate(found.items()):
            colour = COLOURS[index % len(COLOURS)]
            for column, style, name in ((1, "--", None), (2, "-", label)):
                share = np.sort(100 * run.flops[:, column] / run.flops[:, 0])
                axes.plot(100 * (np.arange(len(share)) + 0.5) / len(share), share, color=colour, linestyle=style, linewidth=1.4, label=name)
        axes.set_xlabel("images, % (ascending)")
        axes.set_ylabel("FLOPs, % of dense")
        axes.grid(True, linewidth=0.3, alpha=0.6)
        axes.legend(title="dashed: clean, solid: attacked", fontsize=8, title_fontsize=8)
    return path


def images(found: Mapping[str, Path], path: Path) -> Path:
    """Strips of images: clean, adversarial, and the perturbation, which is magnified so that its largest change spans half the grey scale.

    Args:
        found: row -> its ``strip.npz``.
        path: where to write.
    """
    strips = {label: _strip(file) for label, file in found.items()}
    columns = max(len(strip["ids"]) for strip in strips.values())
    with drawn(path, 1.3 * columns + 0.6, 4.2 * len(strips), 3 * len(strips), columns) as grid:
        for axes in grid.flat:
            axes.set_axis_off()
        for number, (label, strip) in enumerate(strips.items()):
            for index in range(len(strip["ids"])):
                clean, adversarial = strip["clean"][index], strip["adversarial"][index]
                change = adversarial - clean
                largest = float(np.abs(change).max()) or 1.0
                shares = [100 * float(strip[name][index]) / float(strip["flops_dense"][index]) for name in ("flops_clean", "flops_adversarial")]
                panels = (
                    (clean, f"clean {shares[0]:.0f} %"),
                    (adversarial, f"attacked {shares[1]:.0f} %"),
                    (0.5 + change / (2 * largest), f"±{255 * largest:.1f} levels"),
                )
                for row, (pixels, title) in enumerate(panels):
                    axes = grid[3 * number + row][index]
                    axes.imshow(np.clip(pixels.transpose(1, 2, 0), 0, 1), interpolation="nearest")
                    axes.set_title(f"{label}\n{title}" if row == index == 0 else title, fontsize=7)
    return path


def _strip(file: Path) -> dict[str, Any]:
    try:
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in ("ids", "clean", "adversarial", "flops_clean", "flops_adversarial", "flops_dense")}
    except (OSError, ValueError, KeyError) as error:
        raise ReportError(f"{file}: not a strip of images: {error}") from None
