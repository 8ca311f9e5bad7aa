"""The columns that a table recipe may ask for: every one a ratio of sums over images, with its bootstrap interval.

A mean over images is the sum of a column over the number of images, a recovery the FLOPs won back over the FLOPs saved; so one resampling of
the images gives the intervals of all columns of a run at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple

import numpy as np

from gatewatt.metrics.estimates import Column, below_full, bootstrap_sums, percentile_interval, ratio_percent
from gatewatt.reports.collect import ReportError, Run
from gatewatt.reports.tables import Format, one_decimal, three_digits

_CIFAR, _IMAGENET = (0.2023, 0.1994, 0.2010), (0.229, 0.224, 0.225)
STANDARD_DEVIATIONS = {"cifar10": _CIFAR, "cifar100": _CIFAR, "imagenet": _IMAGENET, "cub200": _IMAGENET}
"""Data set -> standard deviations of its channels, pixels in [0, 1], as the authors' release of GradMDM standardises them."""

DRAWS = 2000
SEED = 0


@dataclass(frozen=True)
class Measure:
    """One column: ``scale * sum(top) / sum(bottom)`` over the images of a run.

    Attributes:
        header: as people read it, with the unit.
        top: run -> (n,).
        bottom: run -> (n,).
        scale: factor, 100 for percent.
        show: how a number of this column is written.
    """

    header: str
    top: Callable[[Run], Column]
    bottom: Callable[[Run], Column]
    scale: float = 1.0
    show: Format = one_decimal


class Measured(NamedTuple):
    """A figure with the ends of its 95 % bootstrap interval; all NaN where it is undefined."""

    value: float
    low: float
    high: float


def ones(run: Run) -> Column:
    """One per image: what a mean divides by."""
    return np.ones(len(run.rows))


def _flops(index: int) -> Callable[[Run], Column]:
    return lambda run: run.flops[:, index]


def _mse(index: int) -> Callable[[Run], Column]:
    return lambda run: run.mse[:, index]


def _standardised(run: Run) -> Column:
    """Squared error in units of the data's variance, the same error taken in every channel; NaN for data without known deviations."""
    deviations = STANDARD_DEVIATIONS.get(run.dataset.partition(" ")[0])
    return run.mse[:, 0] * (math.nan if deviations is None else float(np.mean([1 / (255 * one) ** 2 for one in deviations])))


def _won(index: int) -> Callable[[Run], Column]:
    return lambda run: run.flops[:, index] - run.flops[:, 1]


def _saved(run: Run) -> Column:
    return run.flops[:, 0] - run.flops[:, 1]


def _right(prediction: str) -> Callable[[Run], Column]:
    return lambda run: np.array([getattr(row, prediction) == row.label for row in run.rows], dtype=np.float64)


def _saves(run: Run) -> Column:
    return below_full(run.flops[:, 1], run.flops[:, 0]).astype(np.float64)


def _won_per_image(run: Run) -> Column:
    # Images at full FLOPs have no ratio of their own; they count neither above nor below.
    return np.divide(_won(2)(run), _saved(run), out=np.zeros(len(run.rows)), where=_saves(run) > 0)


def _changed(run: Run) -> Column:
    return np.array([math.isfinite(row.psnr_db) for row in run.rows], dtype=np.float64)


def _psnr(run: Run) -> Column:
    return np.array([row.psnr_db if math.isfinite(row.psnr_db) else 0.0 for row in run.rows])


def _seconds(run: Run) -> Column:
    return np.full(len(run.rows), run.summary["wall_seconds"] / len(run.rows))


MEASURES: dict[str, Measure] = {
    "recovery_percent": Measure("recovery %", _won(2), _saved, 100),
    "recovery_8bit_percent": Measure("8-bit recovery %", _won(3), _saved, 100),
    "recovery_per_image_percent": Measure("recovery per image %", _won_per_image, _saves, 100),
    "flops_clean_percent": Measure("clean FLOPs %", _flops(1), _flops(0), 100),
    "flops_adversarial_percent": Measure("attacked FLOPs %", _flops(2), _flops(0), 100),
    "flops_dense": Measure("dense MACs", _flops(0), ones, 1, lambda value: f"{value:,.0f}"),
    "accuracy_clean_percent": Measure("accuracy clean %", _right("prediction_clean"), ones, 100),
    "accuracy_adversarial_percent": Measure("accuracy attacked %", _right("prediction_adversarial"), ones, 100),
    "accuracy_adversarial_8bit_percent": Measure("8-bit accuracy %", _right("prediction_adversarial_8bit"), ones, 100),
    "mse_levels2": Measure("MSE", _mse(0), ones, 1, three_digits),
    "mse_levels2_8bit": Measure("8-bit MSE", _mse(1), ones, 1, three_digits),
    "mse_standardised": Measure("MSE, standardised", _standardised, ones, 1, three_digits),
    "psnr_db": Measure("PSNR dB", _psnr, _changed),
    "linf_levels": Measure("largest change, levels", lambda run: np.array([row.linf_levels for row in run.rows]), ones),
    "seconds_per_image": Measure("seconds per image", _seconds, ones, 1, three_digits),
}
"""Column of a table recipe -> what it measures. FLOPs are MACs per image, MSE is in squared 8-bit levels, standardised it is
that of pixels divided by their standard deviation, PSNR has MAX = 255."""

CONSTANT = ("flops_dense", "seconds_per_image")
"""The same for every image, so without an interval over images."""


def check_columns(columns: Iterable[str], place: str) -> None:
    """Raise unless every column is known.

    Raises:
        ReportError: in one line that opens with ``place`` and names the nearest columns there are.
    """
    for column in columns:
        if column not in MEASURES:
            near = [name for name in MEASURES if column and name.startswith(column)] or get_close_matches(column, MEASURES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(MEASURES)}"
            raise ReportError(f"{place}: there is no column {column!r}; {hint}")


def measure(run: Run, columns: Iterable[str]) -> dict[str, Measured]:
    """Figures of a run with their 95 % intervals.

    Args:
        run: rows of images.
        columns: keys of :data:`MEASURES`.

    Returns:
        Column -> figure. Those of :data:`CONSTANT` have no interval.
    """
    names = list(columns)
    wanted = [MEASURES[name] for name in names]
    images = np.stack([part(run) for one in wanted for part in (one.top, one.bottom)], axis=1)
    # Row 0 holds the sums over the images as they are.
    sums = np.concatenate([images.sum(axis=0)[None], bootstrap_sums(images, draws=DRAWS, seed=SEED)])
    found = {}
    for index, (name, one) in enumerate(zip(names, wanted, strict=True)):
        # ratio_percent leaves a ratio without a denominator undefined; its factor of 100 is the scale of most columns.
        values = ratio_percent(sums[:, 2 * index], sums[:, 2 * index + 1]) * (one.scale / 100)
        interval = (math.nan, math.nan) if name in CONSTANT or math.isnan(values[0]) else percentile_interval(values[1:])
        found[name] = Measured(float(values[0]), *interval)
    return found


def measured_text(column: str, figure: Measured) -> str:
    """A figure as a cell shows it, ``35.1 [33.0, 37.2]``; ``undefined`` where it is.

    Example:
        >>> measured_text("mse_levels2", Measured(18.7048, 17.9, 19.6))
        '18.7 [17.9, 19.6]'
    """
    if not math.isfinite(figure.value):
        return "undefined"
    show = MEASURES[column].show
    return show(figure.value) if not math.isfinite(figure.low) else f"{show(figure.value)} [{show(figure.low)}, {show(figure.high)}]"
