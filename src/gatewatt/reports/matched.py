"""Compare attacks at equal MSE, and decide the paper's ordering by a bootstrap paired by image.

gamma has no meaning across methods, so each method is swept and its recovery is read off at common MSE values: linearly in log MSE between
its runs. One resample of images serves all runs of a panel, so what two methods share (hard images, easy images) cancels in their difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np

from gatewatt.metrics.estimates import Column, below_full, bootstrap_sums, percentile_interval, ratio_percent
from gatewatt.reports.collect import RANKING, Panel, Run

Image = Literal["float", "8bit"]
"""Which adversarial image is measured: as the attack returned it, or after rounding to 8 bits."""

Verdict = Literal["holds", "ties", "reversed"]

TIE_POINTS = 1e-6
"""An interval this close to 0 (percentage points) touches it: identical runs may differ in the last bits of their sums."""


class MatchedPoint(NamedTuple):
    """Recovery of one method at one MSE.

    Attributes:
        method: label within the panel.
        mse_levels2: squared 8-bit levels, mean over images.
        recovery_percent: interpolated.
        low: lower end of the bootstrap interval.
        high: upper end.
    """

    method: str
    mse_levels2: float
    recovery_percent: float
    low: float
    high: float


class Ordering(NamedTuple):
    """One comparison of the paper at one MSE.

    Attributes:
        mse_levels2: squared 8-bit levels.
        stronger: the method that the paper puts first.
        weaker: the method that the paper puts second.
        adjacent: whether the two are neighbours in the paper's ranking, among the methods present.
        difference: recovery of ``stronger`` minus recovery of ``weaker``, percentage points.
        low: lower end of the bootstrap interval of the difference.
        high: upper end.
        verdict: ``holds`` if the interval lies above 0, ``reversed`` if below, else ``ties``.
    """

    mse_levels2: float
    stronger: str
    weaker: str
    adjacent: bool
    difference: float
    low: float
    high: float
    verdict: Verdict


@dataclass(frozen=True)
class Matched:
    """Methods of a panel at common MSE values.

    Attributes:
        image: which adversarial image was measured.
        mse_levels2: the common values, ascending; empty if the methods share no range.
        points: one per method and value.
        orderings: one per pair that the paper ranks, and value.
        notes: what could not be compared, and why.
    """

    image: Image
    mse_levels2: tuple[float, ...]
    points: tuple[MatchedPoint, ...]
    orderings: tuple[Ordering, ...]
    notes: tuple[str, ...]


def match(
    panel: Panel, *, image: Image = "float", mse_levels2: Sequence[float] | None = None, draws: int = 2000, seed: int = 0, level: float = 95.0
) -> Matched:
    """Recovery of every method of a panel at common MSE values.

    Args:
        panel: runs on the same images.
        image: which adversarial image to measure.
        mse_levels2: values to compare at; by default round ones inside the range that the compared methods cover. A method that shares no range
            with the others is left out, and the notes say so.
        draws: bootstrap resamples.
        seed: of the resampling.
        level: coverage of the intervals in percent, for each comparison by itself.

    Raises:
        ValueError: if a value of ``mse_levels2`` lies outside the range that the compared methods cover: nothing is extrapolated.
    """
    notes: list[str] = []
    if (fault := _not_one_network(panel)) is not None:
        return Matched(image, (), (), (), (fault,))
    curves: dict[str, list[Run]] = {}
    for method, runs in panel.methods.items():
        distinct = distinct_runs(runs, image)
        if len(distinct) < 2:
            notes.append(f"{method} is left out: a line needs runs at two or more MSE values above 0, it has {len(distinct)}")
        else:
            curves[method] = distinct
    if len(curves) < 2:
        return Matched(image, (), (), (), (*notes, "fewer than two methods have a line: nothing to compare"))

    ranges = {method: (mean_mse(runs[0], image), mean_mse(runs[-1], image)) for method, runs in curves.items()}
    together = _overlapping(ranges)
    if len(together) < 2:
        covered = ", ".join(f"{method} {low:.3g} to {high:.3g}" for method, (low, high) in ranges.items())
        return Matched(image, (), (), (), (*notes, f"no two methods share an MSE range: {covered}"))
    low, high = max(ranges[method][0] for method in together), min(ranges[method][1] for method in together)
    for method in [method for method in curves if method not in together]:
        start, end = ranges[method]
        notes.append(f"{method} is left out: its MSE values, {start:.3g} to {end:.3g}, share no range with those of the others")
        del curves[method]
    values = round_values(low, high) if mse_levels2 is None else tuple(sorted(mse_levels2))
    for value in values:
        if not low <= value <= high:
            raise ValueError(f"MSE {value:g} lies outside {low:.3g} to {high:.3g}, the range that the compared methods cover")

    samples = interpolated(list(curves.values()), np.log(values), image, draws=draws, seed=seed)
    recovery = dict(zip(curves, samples, strict=True))
    points = tuple(
        MatchedPoint(method, value, float(found[0, index]), *percentile_interval(found[1:, index], level))
        for index, value in enumerate(values)
        for method, found in recovery.items()
    )
    return Matched(image, values, points, tuple(_orderings(panel, recovery, values, level)), tuple(notes))


def _overlapping(ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """The most methods whose ranges of MSE all overlap, in order; of as many, those with the widest range in common."""
    found: list[str] = []
    width = 0.0
    # The range that a group shares begins where one of its methods begins.
    for start, _ in ranges.values():
        group = [method for method, (low, high) in ranges.items() if low <= start < high]
        shared = math.log(min((ranges[method][1] for method in group), default=start) / start)
        if (len(group), shared) > (len(found), width):
            found, width = group, shared
    return found


def _orderings(panel: Panel, recovery: dict[str, Column], values: Sequence[float], level: float) -> list[Ordering]:
    names = {panel.labels[run.name]: run.attack.name for run in panel.runs}
    ranked = [method for method in recovery if names[method] in RANKING]
    present = sorted({RANKING.index(names[method]) for method in ranked})
    orderings = []
    for index, value in enumerate(values):
        for stronger, weaker in combinations(ranked, 2):
            ranks = present.index(RANKING.index(names[stronger])), present.index(RANKING.index(names[weaker]))
            if ranks[0] >= ranks[1]:
                continue
            differences = recovery[stronger][:, index] - recovery[weaker][:, index]
            low, high = percentile_interval(differences[1:], level)
            verdict: Verdict = "holds" if low > TIE_POINTS else "reversed" if high < -TIE_POINTS else "ties"
            orderings.append(Ordering(value, stronger, weaker, ranks[1] - ranks[0] == 1, float(differences[0]), low, high, verdict))
    return orderings


def interpolated(curves: list[list[Run]], log_values: Column, image: Image, *, draws: int, seed: int) -> list[Column]:
    """Recovery of several curves at common MSE values, linear in log MSE between a curve's runs.

    Args:
        curves: of each method, or network, its runs at two or more MSE values; all on the same images, one resample of which serves all.
        log_values: logarithms of the MSE values.
        image: which adversarial image to measure.
        draws: bootstrap resamples.
        seed: of the resampling.

    Returns:
        Per curve (1 + draws, values), in percent: from the sums over all images, then over each resample.
    """
    runs = [run for curve in curves for run in curve]
    # (n, 3, R): what the attack won, what the clean image saved, squared error
    columns = np.stack([np.stack([_won(run, image), run.flops[:, 0] - run.flops[:, 1], _mse(run, image)], axis=1) for run in runs], axis=2)
    images = len(columns)
    sums = bootstrap_sums(columns.reshape(images, -1), draws=draws, seed=seed).reshape(draws, 3, len(runs))
    won, saved, error = np.moveaxis(np.concatenate([columns.sum(axis=0)[None], sums]), 1, 0)
    recovery = ratio_percent(won, saved)
    # A resample may hold unchanged images only: floor its MSE instead of taking log 0.
    log_mse = np.log(np.maximum(error / images, 1e-300))
    results, start = [], 0
    for curve in curves:
        stop = start + len(curve)
        # Sorted anew in each resample, where close neighbours may swap. Beyond the ends np.interp holds the end value.
        order = np.argsort(log_mse[:, start:stop], axis=1)
        x, y = (np.take_along_axis(table[:, start:stop], order, axis=1) for table in (log_mse, recovery))
        results.append(np.stack([np.interp(log_values, x[draw], y[draw]) for draw in range(len(x))]))
        start = stop
    return results


def round_values(low: float, high: float) -> tuple[float, ...]:
    """At least four round values inside the range if it is wide enough for them, else five spread evenly in log MSE."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        # float("3e-2") is the nearest double to 0.03; 3 * 10.0**-2 need not be
        inside = tuple(value for decade in decades for digit in digits if low <= (value := float(f"{digit}e{decade}")) <= high)
        if len(inside) >= 4:
            return inside
    return tuple(float(value) for value in np.geomspace(low, high, 7)[1:-1])


def distinct_runs(runs: list[Run], image: Image) -> list[Run]:
    """Runs by ascending mean MSE; unchanged images have no place on a log axis, and of several at one MSE the first is kept."""
    kept: list[Run] = []
    for run in sorted(runs, key=lambda run: mean_mse(run, image)):
        mse = mean_mse(run, image)
        if mse > 0 and not (kept and math.isclose(mse, mean_mse(kept[-1], image), rel_tol=1e-9)):
            kept.append(run)
    return kept


def _not_one_network(panel: Panel) -> str | None:
    first = panel.runs[0]
    for run in panel.runs[1:]:
        if run.ids != first.ids:
            return f"not compared: {first.name} and {run.name} attacked different images, which cannot be paired"
        if [row.label for row in run.rows] != [row.label for row in first.rows]:
            return f"not compared: {first.name} and {run.name} name the same data but their labels differ"
        differing = int((~np.isclose(run.flops[:, :2], first.flops[:, :2], rtol=1e-9)).any(axis=1).sum())
        # A gate on its threshold may flip between machines; more than that is another network under the same name.
        if differing > 0.01 * panel.images:
            of = f"{differing} of {panel.images} images"
            return f"not compared: {first.name} and {run.name} name the same network but their clean FLOPs differ for {of}"
    if not below_full(first.flops[:, 1], first.flops[:, 0]).any():
        return "not compared: every clean image is at full FLOPs, so recovery is undefined"
    return None


def _won(run: Run, image: Image) -> Column:
    return run.flops[:, 2 if image == "float" else 3] - run.flops[:, 1]


def _mse(run: Run, image: Image) -> Column:
    return run.mse[:, 0 if image == "float" else 1]


def mean_mse(run: Run, image: Image) -> float:
    """Squared 8-bit levels, the mean over images."""
    return float(_mse(run, image).mean())
