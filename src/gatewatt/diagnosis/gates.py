"""Checks of the gates themselves: do they save, do they look at the image, do they repeat themselves, does a gradient lead to them?

What hides a gradient, and how it shows: Athalye et al., "Obfuscated Gradients Give a False Sense of Security" (ICML
2018); networks with gates add their own: gates stuck open, stuck closed, or on one route for all images.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from gatewatt.diagnosis.check import Finding, at_least
from gatewatt.diagnosis.evidence import Evidence, share
from gatewatt.metrics import route_statistics

LEAST_SAVING = 20.0
"""Percent of dense that the clean images must save (attacks that recover a share of nothing prove nothing)."""
LEAST_VARIED = 10.0
"""Percent of the units that must run for some images and not for others."""
LEAST_SPREAD = 0.5
"""Percent of dense by which the FLOPs of clean images must spread (standard deviation)."""
MOST_ON_ONE_ROUTE = 95.0
"""Percent of the images that may share one route."""
CHANCE = 0.05
"""How likely a network at the bar may be to look as static as what was seen; above, a check of routes cannot tell."""
REPEATS = 5
"""Passes over the same images."""
MOST_DEAD = 10.0
"""Percent of the closed gates that may lack a gradient, of those that move or that have one in their logit."""


def scores_finite(evidence: Evidence) -> Finding:
    """Scores and logits are numbers."""
    bad = 0
    for output in evidence.run(evidence.images):
        values = torch.cat([output.logits, *(gate.score for gate in output.gates.values())], dim=1)
        bad += int((~torch.isfinite(values).all(dim=1)).sum())
    n = len(evidence.images)
    if bad:
        return Finding("fail", f"{bad} of {n} images", "a comparison with NaN is false: such a gate closes and looks efficient", {"images": bad})
    return Finding("pass", f"0 of {n} images", "every score and logit is finite", {"images": 0})


def clean_saving(evidence: Evidence) -> Finding:
    """Clean images spend clearly less than dense ones: otherwise there is nothing to defend."""
    dense = np.full(len(evidence.images), evidence.ledger.dense)
    saving = share(dense - evidence.clean.flops, dense)
    outcome = at_least(saving, LEAST_SAVING)
    reason = {
        "pass": "there is something to recover",
        "fail": "the gates save too little for a recovery to mean anything",
        "cannot tell": "too few images to tell it from the bar",
    }[outcome]
    return Finding(outcome, f"{saving} % below dense", reason, {"saving_percent": saving.value, "interval": [saving.low, saving.high]})


def gates_vary(evidence: Evidence) -> Finding:
    """Gates decide by the image: enough units run for some images only, and FLOPs spread."""
    executed, flops = evidence.clean.executed, evidence.clean.flops
    varied = 100 - route_statistics(executed).static_percent
    spread = float(100 * flops.std() / evidence.ledger.dense)
    always = int(executed.all(axis=0).sum())
    never = int((~executed.any(axis=0)).sum())
    measured = f"{varied:.1f} % of {executed.shape[1]} units, FLOPs spread by {spread:.2f} % of dense"
    figures = {"varied_percent": varied, "spread_percent": spread, "units": executed.shape[1], "always_run": always, "never_run": never}
    stuck = f"{always} units always run, {never} never"
    if varied >= LEAST_VARIED and spread >= LEAST_SPREAD:
        return Finding("pass", measured, stuck, figures)
    if tail(len(flops), len(flops)) > CHANCE:
        return Finding("cannot tell", measured, f"{stuck}, of so few images", figures)
    return Finding("fail", measured, f"stuck gates: {stuck}", figures)


def routes_differ(evidence: Evidence) -> Finding:
    """Images take different routes: a network that sends all of them along one is static."""
    statistics = route_statistics(evidence.clean.executed)
    _, counts = np.unique(evidence.clean.executed, axis=0, return_counts=True)
    common = float(100 * counts.max() / counts.sum())
    measured = f"{common:.1f} % on the commonest of {statistics.routes}, {statistics.entropy_bits:.1f} bits"
    figures = {"commonest_percent": common, "routes": statistics.routes, "entropy_bits": statistics.entropy_bits}
    if common <= MOST_ON_ONE_ROUTE:
        return Finding("pass", measured, "the route depends on the image", figures)
    if tail(int(counts.max()), int(counts.sum())) > CHANCE:
        return Finding("cannot tell", measured, "too few images to tell it from the bar", figures)
    return Finding("fail", measured, "nearly static: compare it with the static network of that route", figures)


def tail(seen: int, images: int) -> float:
    """Probability that ``seen`` or more of the images share a route that :data:`MOST_ON_ONE_ROUTE` of all images take.

    Example:
        >>> tail(12, 12) > CHANCE > tail(60, 60)
        True
    """
    share = MOST_ON_ONE_ROUTE / 100
    return sum(math.comb(images, k) * share**k * (1 - share) ** (images - k) for k in range(seen, images + 1))


def decisions_repeat(evidence: Evidence) -> Finding:
    """The same images open the same gates each time."""
    again = [evidence.passes(evidence.images).executed for _ in range(REPEATS)]
    changed: np.ndarray = np.any([executed != again[0] for executed in again[1:]], axis=0)
    images, units = int(changed.any(axis=1).sum()), int(changed.any(axis=0).sum())
    figures = {"images": images, "units": units, "repeats": REPEATS}
    if images:
        reason = "random gates: attack their expectation and measure every image many times (mean and 95th percentile)"
        return Finding("fail", f"{units} units change on {images} images", reason, figures)
    return Finding("pass", f"identical {REPEATS} times", "deterministic", figures)


def gradient_alive(evidence: Evidence) -> Finding:
    """Closed gates that answer to a change of the image have a gradient, in their score or in its logit."""
    slopes = evidence.slopes
    if not slopes.finite:
        return Finding("fail", "NaN or infinite", "no attack with gradients can be trusted where one is not a number", {"finite": False})
    dead = slopes.closed & ~slopes.score & ~slopes.logit
    asked = slopes.closed & (slopes.moved | slopes.score | slopes.logit)
    total, masked = int(asked.sum()), int((dead & slopes.moved).sum())
    figures = {"closed": int(slopes.closed.sum()), "answering": total, "dead": masked, "finite": True}
    if total == 0:
        return Finding("cannot tell", f"none of {int(slopes.closed.sum())} answers", "no closed gate has a gradient, nor moves under noise", figures)
    measured = f"{100 * masked / total:.1f} % of {total} closed gates"
    if 100 * masked / total > MOST_DEAD:
        return Finding("fail", measured, "these scores move with the image, yet their gradient is exactly 0: it is hidden", figures)
    return Finding("pass", measured, "what moves under noise has a gradient", figures)


def gates_unsaturated(evidence: Evidence) -> Finding:
    """Closed gates are not pinned where float32 rounds their slope to 0 while their logits still move."""
    slopes = evidence.slopes
    pinned, asked = int((slopes.closed & ~slopes.score & slopes.logit).sum()), int((slopes.closed & (slopes.score | slopes.logit)).sum())
    figures = {"closed": int(slopes.closed.sum()), "with_gradient": asked, "pinned": pinned}
    if asked == 0:
        return Finding(
            "cannot tell", f"none of {int(slopes.closed.sum())} has a gradient", "no closed gate has a gradient, in score or logit", figures
        )
    measured = f"{100 * pinned / asked:.1f} % of {asked} closed gates"
    if 100 * pinned / asked > MOST_DEAD:
        return Finding("fail", measured, "scores of exactly 0 whose logits move: only a loss in logits sees them", figures)
    return Finding("pass", measured, "scores keep a slope", figures)
