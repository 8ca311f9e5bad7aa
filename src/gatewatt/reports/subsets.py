"""Settings that are chosen on subset A of the test images, and what they do on subset B, whose images had no part in the choice.

A strength that is the best of several on the very images that it is reported on is flattered by them. What the rows lose from A to B, beyond
their intervals, is what the choice owed to its images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gatewatt.metrics.estimates import recovery_percent
from gatewatt.reports.collect import Run
from gatewatt.reports.matched import round_values
from gatewatt.reports.measures import measure, measured_text
from gatewatt.reports.tables import Format, Table, strength_text, three_digits

COLUMNS = ("recovery_percent", "mse_levels2")


class Pair(NamedTuple):
    """One setting on both subsets.

    Attributes:
        chosen_on: the run on subset A.
        reported_on: the run on subset B.
    """

    chosen_on: Run
    reported_on: Run


class Choice(NamedTuple):
    """The setting of a method under an MSE.

    Attributes:
        method: label of the row.
        allowed: squared 8-bit levels that the mean over subset A must not exceed.
        pair: the setting.
    """

    method: str
    allowed: float
    pair: Pair


def choose(pairs: Mapping[str, Sequence[Pair]]) -> list[Choice]:
    """For each of some round MSEs and each method, the setting of largest recovery on subset A among those that keep to the MSE there.

    Args:
        pairs: method -> its settings. Nothing of ``reported_on`` is looked at.

    Returns:
        By MSE, then by method. Every method has a setting within the smallest MSE.
    """
    found = {method: [(float(pair.chosen_on.mse[:, 0].mean()), pair) for pair in settings] for method, settings in pairs.items()}
    low = max(min(mse for mse, _ in settings) for settings in found.values())
    high = min(max(mse for mse, _ in settings) for settings in found.values())
    choices = []
    for allowed in round_values(low, high) if 0 < low < high else (low,):
        for method, settings in found.items():
            within = [pair for mse, pair in settings if mse <= allowed]
            choices.append(Choice(method, allowed, max(within, key=lambda pair: recovery(pair.chosen_on))))
    return choices


def choices_table(choices: Sequence[Choice]) -> Table:
    """Every choice with recovery and MSE on either subset, each with its 95 % interval."""
    columns: dict[str, Format] = {"MSE allowed": three_digits, "method": str, "chosen on A": str}
    columns |= dict.fromkeys(("recovery % on A", "recovery % on B", "MSE on A", "MSE on B"), str)
    rows = []
    for method, allowed, pair in choices:
        own, other = (measure(run, COLUMNS) for run in pair)
        figures = [measured_text(column, subset[column]) for column in COLUMNS for subset in (own, other)]
        rows.append((allowed, method, strength_text(pair.chosen_on), *figures))
    return Table(columns, tuple(rows))


def recovery(run: Run) -> float:
    """Recovery in percent, a ratio of sums."""
    dense, clean, adversarial, _ = run.flops.T
    return recovery_percent(clean, adversarial, dense)
