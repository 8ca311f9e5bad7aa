"""Checks of the attacks: does what they find behave as it must where gradients are honest?

A stronger attacker finds more: with a larger radius, without a bound, with more steps, with gradients rather than by chance (Athalye et al., ICML
2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019). Where he does not, the attack is blind and its recovery no bound.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from gatewatt.diagnosis.check import Estimate, Finding, at_least, beyond, worst
from gatewatt.diagnosis.evidence import LONGER, ROUNDING, Attacked, Evidence

TOLERANCE = 1.0
"""Percentage points of recovery by which a stronger attacker may fall behind: attacks are no exact maxima."""
LEAST_UNBOUNDED = 90.0
"""Percent of the reachable recovery that an attack without a bound must find."""
MOST_GAINED = 2.0
"""Percentage points that :data:`~gatewatt.diagnosis.evidence.LONGER` times the steps may add."""
LEAST_KEPT = 80.0
"""Percent of the recovery that must be left after rounding to 8 bits."""

Examination = Callable[[Evidence], Finding]


def of_what_is_saved(check: Examination) -> Examination:
    """A check that has nothing to say where no clean image saves FLOPs."""

    @functools.wraps(check)
    def checked(evidence: Evidence) -> Finding:
        if not evidence.saves:
            return Finding("cannot tell", "nothing is saved", "every clean image runs everything: there is nothing to recover")
        return check(evidence)

    return checked


def interval(estimate: Estimate) -> list[float]:
    """The two ends."""
    return [estimate.low, estimate.high]


def hindered(attacked: Attacked, otherwise: str) -> str:
    """A reason, unless the attack met an obstacle: then that is it."""
    return attacked.obstacle or otherwise


@of_what_is_saved
def grows_with_epsilon(evidence: Evidence) -> Finding:
    """A larger ball holds the smaller one, so recovery cannot fall."""
    found = [evidence.white_box(eps) for eps in evidence.radii]
    recoveries = [evidence.recovery(attacked.flops) for attacked in found]
    steps = [evidence.percent_of_saved(larger.flops - smaller.flops) for smaller, larger in pairwise(found)]
    measured = ", ".join(f"{recovery.value:.1f}" for recovery in recoveries) + " % at " + ", ".join(f"{eps:.3g}" for eps in evidence.radii)
    figures = {"eps": list(evidence.radii), "recovery_percent": [recovery.value for recovery in recoveries]}
    if not recoveries[-1].positive:
        return Finding("cannot tell", measured, hindered(found[-1], "no radius recovers anything"), figures)
    outcome = worst([at_least(step, -TOLERANCE) for step in steps])
    fall = f"recovery falls by {-min(step.value for step in steps):.1f} points where it cannot"
    reason = {
        "pass": "more room, more recovery",
        "fail": f"{fall}: the gradient misleads, or the steps are too few",
        "cannot tell": f"{fall}; more images would tell whether by chance",
    }[outcome]
    return Finding(outcome, measured, reason, figures)


@of_what_is_saved
def unbounded_attack(evidence: Evidence) -> Finding:
    """Without a bound an attack comes near the most FLOPs that any input of the examination reached."""
    # The longer attack: a radius so large takes time, and it is the network that is on trial here, not the budget.
    largest = evidence.white_box(evidence.unbounded, times=LONGER)
    # Smaller balls lie within, so that what was found there counts.
    flops = np.maximum.reduce([largest.flops, *(evidence.white_box(eps).flops for eps in evidence.radii)])
    never = evidence.never_opened()
    reach = f"{100 * evidence.highest / evidence.ledger.dense:.1f} % of dense"
    closed = f"; opened by no input: {named(never)}" if never else ""
    if evidence.highest <= evidence.clean.flops.max() and evidence.clean.flops.std() == 0:
        return Finding(
            "fail", "0 % of nothing", f"no input of any kind opens what is closed{closed}", {"reachable": evidence.highest, "never_opened": never}
        )
    found = evidence.percent_of_saved(flops - evidence.clean.flops, evidence.highest)
    figures = {
        "recovery_of_reachable_percent": found.value,
        "interval": interval(found),
        "recovery_percent": evidence.recovery(flops).value,
        "reachable_flops": evidence.highest,
        "flops_of_all_units_ever_opened": evidence.all_ever_opened(),
        "never_opened": never,
    }
    outcome = at_least(found, LEAST_UNBOUNDED)
    reason = f"one input reached {reach}{closed}"
    return Finding(outcome, f"{found} % of the reachable", reason if outcome == "pass" else hindered(largest, reason), figures)


@of_what_is_saved
def steps_suffice(evidence: Evidence) -> Finding:
    """Several times as many steps find hardly more."""
    short, long = evidence.white_box(), evidence.white_box(times=LONGER)
    gained = evidence.percent_of_saved(long.flops - short.flops)
    measured = f"{gained} points more after {LONGER * evidence.steps} steps"
    figures = {"gained_points": gained.value, "interval": interval(gained)}
    if not evidence.recovery(long.flops).positive:
        return Finding("cannot tell", measured, hindered(long, "neither recovers anything"), figures)
    outcome = at_least(Estimate(-gained.value, -gained.high, -gained.low), -MOST_GAINED)
    reason = {
        "pass": "the attack has converged",
        "fail": f"the attack had not converged after {evidence.steps} steps: examine with more",
        "cannot tell": "more images would tell whether that is more than the bar",
    }[outcome]
    return Finding(outcome, measured, reason, figures)


@of_what_is_saved
def beats_noise(evidence: Evidence) -> Finding:
    """Perturbations that know nothing of the network recover less."""
    attack = evidence.white_box()
    recoveries = {kind: evidence.recovery(noise.flops).value for kind, noise in evidence.noises.items()}
    strongest = max(recoveries, key=lambda kind: recoveries[kind])
    ahead = evidence.percent_of_saved(attack.flops - evidence.noises[strongest].flops)
    measured = f"{ahead} points ahead of {strongest} ({recoveries[strongest]:.1f} %)"
    outcome = beyond(ahead, 0.0)
    reason = {
        "pass": "the attack knows more than chance",
        "fail": "noise recovers more than the attack: the attack is blind",
        "cannot tell": "the attack recovers no more than noise does",
    }[outcome]
    figures = {"ahead_points": ahead.value, "interval": interval(ahead), "noise_recovery_percent": recoveries}
    return Finding(outcome, measured, reason if outcome == "pass" else hindered(attack, reason), figures)


def compared(evidence: Evidence, other: Attacked, name: str) -> Finding:
    """The attack with gradients on the network itself against another attack."""
    attack = evidence.white_box()
    own, theirs = evidence.recovery(attack.flops), evidence.recovery(other.flops)
    ahead = evidence.percent_of_saved(attack.flops - other.flops)
    measured = f"{own.value:.1f} against {theirs.value:.1f} %, {ahead} points ahead"
    figures = {"recovery_percent": own.value, f"{name}_recovery_percent": theirs.value, "ahead_points": ahead.value, "interval": interval(ahead)}
    if not own.positive and not theirs.positive:
        return Finding("cannot tell", measured, "neither recovers anything: widen the ball", figures)
    outcome = at_least(ahead, -TOLERANCE)
    reason = {
        "pass": "gradients help",
        "fail": f"{name} finds what gradients do not",
        "cannot tell": f"{name} may find what gradients do not; more images would tell",
    }[outcome]
    return Finding(outcome, measured, reason if outcome == "pass" else hindered(attack, reason), figures)


@of_what_is_saved
def beats_search(evidence: Evidence) -> Finding:
    """An attack with gradients finds at least what a random search of the same budget does."""
    return compared(evidence, evidence.search, "search")


@of_what_is_saved
def beats_transfer(evidence: Evidence) -> Finding:
    """An attack crafted on the network finds at least what one crafted on another network does."""
    finding = compared(evidence, evidence.transfer, "transfer")
    search = evidence.recovery(evidence.search.flops).value
    # Transfer is expected above the search, but where it is not, that says that the source is unlike the network, not that the gradient is hidden.
    return Finding(
        finding.outcome, f"{finding.measured}; search {search:.1f} %", finding.reason, {**finding.figures, "search_recovery_percent": search}
    )


def images_valid(evidence: Evidence) -> Finding:
    """Every adversarial image is an image, and within its ball."""
    made = evidence.made
    if not made:
        return Finding("cannot tell", "no attack was run", "nothing to look at")
    outside, excess = max((attacked.outside for attacked in made), key=nan_last), max((attacked.beyond for attacked in made), key=nan_last)
    figures = {"attacks": len(made), "outside": outside, "beyond": excess}
    # A comparison with NaN is false.
    if outside <= ROUNDING and excess <= ROUNDING:
        return Finding("pass", f"{len(made)} attacks", "all in [0, 1] and within their radius", figures)
    return Finding("fail", f"{outside:.2g} outside [0, 1], {excess:.2g} beyond the radius", "an attack left its ball or [0, 1]", figures)


def nan_last(value: float) -> float:
    """A key that sorts NaN above every number."""
    return value if value == value else float("inf")


@of_what_is_saved
def survives_8bit(evidence: Evidence) -> Finding:
    """Most of what was recovered is left when the images are saved as files."""
    attack = evidence.white_box(times=LONGER)
    own, rounded = evidence.recovery(attack.flops), evidence.recovery(attack.flops_8bit)
    measured = f"{rounded.value:.1f} of {own.value:.1f} %"
    figures = {"recovery_percent": own.value, "recovery_8bit_percent": rounded.value}
    if not own.positive:
        return Finding("cannot tell", measured, hindered(attack, "nothing was recovered that could be lost"), figures)
    gains = attack.flops_8bit - evidence.clean.flops - LEAST_KEPT / 100 * (attack.flops - evidence.clean.flops)
    outcome = at_least(evidence.percent_of_saved(gains), 0.0)
    return Finding(
        outcome, measured, "the recovery can be saved as PNG" if outcome == "pass" else "rounding takes it back: quote the 8-bit figure", figures
    )


def named(units: dict[str, int], limit: int = 4) -> str:
    """The first gates and how many of their units, and how many more gates there are.

    Example:
        >>> named({"block1": 1, "block2": 3})
        'block1 (1), block2 (3)'
    """
    listed = [f"{name} ({count})" for name, count in list(units.items())[:limit]]
    return ", ".join(listed) + (f" and {len(units) - limit} more gates" if len(units) > limit else "")
