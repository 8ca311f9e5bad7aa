"""What a check answers, and what all answers together say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

Outcome = Literal["pass", "fail", "cannot tell"]
"""A difference that the choice of images explains is ``cannot tell``, never a fail."""

DRAWS = 2000
"""Bootstrap resamples of the images behind every interval."""


class Estimate(NamedTuple):
    """A figure with its 95 % bootstrap interval over images; NaN where it is undefined."""

    value: float
    low: float
    high: float

    @property
    def positive(self) -> bool:
        """Whether it lies above 0 by more than the choice of images explains."""
        return self.low > 0

    def __str__(self) -> str:
        return "undefined" if math.isnan(self.value) else f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def at_least(estimate: Estimate, bar: float) -> Outcome:
    """Whether a figure reaches a bar; one below it fails only if its whole interval is.

    Example:
        >>> [at_least(Estimate(value, value - 2, value + 2), 20) for value in (20, 19, 17, float("nan"))]
        ['pass', 'cannot tell', 'fail', 'cannot tell']
    """
    if estimate.value >= bar:
        return "pass"
    return "fail" if estimate.high < bar else "cannot tell"


def beyond(estimate: Estimate, bar: float) -> Outcome:
    """Whether a figure lies above a bar, with its whole interval; it fails if its whole interval lies below.

    Example:
        >>> [beyond(Estimate(value, value - 2, value + 2), 0) for value in (3, 1, -1, -3)]
        ['pass', 'cannot tell', 'cannot tell', 'fail']
    """
    if estimate.low > bar:
        return "pass"
    return "fail" if estimate.high < bar else "cannot tell"


def worst(outcomes: list[Outcome]) -> Outcome:
    """The outcome of several comparisons together: a fail outweighs a doubt, a doubt outweighs a pass."""
    return "fail" if "fail" in outcomes else "cannot tell" if "cannot tell" in outcomes else "pass"


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        outcome: ``pass``, ``fail`` or ``cannot tell``.
        measured: what was measured, in words.
        reason: one line on what that means.
        figures: the same as numbers.
    """

    outcome: Outcome
    measured: str
    reason: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One check of an examination.

    Attributes:
        name: what is checked, as the verdict calls it.
        bar: what was asked for.
        finding: what was found.
        seconds: what the check took, the attacks that it was the first to need included.
    """

    name: str
    bar: str
    finding: Finding
    seconds: float

    @property
    def outcome(self) -> Outcome:
        """``pass``, ``fail`` or ``cannot tell``."""
        return self.finding.outcome

    @property
    def reason(self) -> str:
        """One line on what was found."""
        return self.finding.reason


@dataclass(frozen=True)
class Diagnosis:
    """All checks of one network.

    Attributes:
        checks: in the order in which they ran.
        settings: the budget, as plain values.
        figures: what the examination measured beside its checks: FLOPs, recovery, accuracy.
    """

    checks: tuple[Check, ...]
    settings: Mapping[str, Any]
    figures: Mapping[str, Any]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == "fail")

    @property
    def undecided(self) -> tuple[Check, ...]:
        """The checks that could not tell."""
        return tuple(check for check in self.checks if check.outcome == "cannot tell")

    @property
    def believable(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """``believable``, or ``not believable`` with the reasons; checks that could not tell are named."""
        if self.failed:
            return "not believable: " + "; ".join(f"{check.name} ({check.reason})" for check in self.failed)
        open_questions = ", ".join(check.name for check in self.undecided)
        return f"believable; cannot tell: {open_questions}" if open_questions else "believable"

    def __getitem__(self, name: str) -> Check:
        """The check of a name."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"no check {name!r} was made; there are {', '.join(check.name for check in self.checks)}")

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for a JSON file; what is undefined is NaN."""
        checks = [{"name": check.name, "bar": check.bar, **asdict(check.finding), "seconds": check.seconds} for check in self.checks]
        return {
            "verdict": self.verdict,
            "believable": self.believable,
            "checks": checks,
            "figures": dict(self.figures),
            "settings": dict(self.settings),
        }
