"""The examination: every check in turn, and what they say together."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from gatewatt.diagnosis import gates, strength
from gatewatt.diagnosis.check import Check, Diagnosis, Finding
from gatewatt.diagnosis.evidence import LONGER, Evidence, Settings
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork


class Question(NamedTuple):
    """What a check asks for, and how it finds out."""

    bar: str
    answer: Callable[[Evidence], Finding]


CHECKS: dict[str, Question] = {
    "scores finite": Question("no NaN, no infinity", gates.scores_finite),
    "clean saving": Question(f"at least {gates.LEAST_SAVING:g} %", gates.clean_saving),
    "gates vary": Question(f"{gates.LEAST_VARIED:g} % of units, {gates.LEAST_SPREAD:g} % of dense", gates.gates_vary),
    "routes differ": Question(f"at most {gates.MOST_ON_ONE_ROUTE:g} % on one", gates.routes_differ),
    "decisions repeat": Question("identical", gates.decisions_repeat),
    "gradient alive": Question(f"at most {gates.MOST_DEAD:g} % hidden", gates.gradient_alive),
    "gates unsaturated": Question(f"at most {gates.MOST_DEAD:g} % pinned", gates.gates_unsaturated),
    "grows with epsilon": Question(f"falls by at most {strength.TOLERANCE:g} point", strength.grows_with_epsilon),
    "steps suffice": Question(f"at most {strength.MOST_GAINED:g} points from {LONGER} times the steps", strength.steps_suffice),
    "beats noise": Question("ahead", strength.beats_noise),
    "beats search": Question(f"at most {strength.TOLERANCE:g} point behind", strength.beats_search),
    "beats transfer": Question(f"at most {strength.TOLERANCE:g} point behind", strength.beats_transfer),
    # After the others, since it counts what any of their inputs opened.
    "unbounded attack": Question(f"at least {strength.LEAST_UNBOUNDED:g} % of the reachable", strength.unbounded_attack),
    "images valid": Question("in [0, 1] and in the ball", strength.images_valid),
    "survives 8 bits": Question(f"at least {strength.LEAST_KEPT:g} % kept", strength.survives_8bit),
}
"""Name -> what it asks for and how it finds out, in the order in which they run."""


def examine(evidence: Evidence) -> Iterator[Check]:
    """Make the checks one after the other; without a source there is no transfer to check, and scores that are not finite end the examination."""
    for name in asked(evidence):
        start = time.perf_counter()
        finding = CHECKS[name].answer(evidence)
        yield Check(name, CHECKS[name].bar, finding, time.perf_counter() - start)
        if name == "scores finite" and finding.outcome == "fail":
            return


def asked(evidence: Evidence) -> list[str]:
    """Names of the checks that :func:`examine` makes."""
    return [name for name in CHECKS if name != "beats transfer" or evidence.source is not None]


def conclude(evidence: Evidence, checks: list[Check]) -> Diagnosis:
    """The diagnosis from all checks of an examination."""
    settings = {
        "network": type(evidence.network).__name__,
        "source": None if evidence.source is None else type(evidence.source).__name__,
        "images": len(evidence.images),
        "norm": evidence.norm,
        "eps": evidence.eps,
        "steps": evidence.steps,
        "seed": evidence.seed,
    }
    figures: dict[str, float | None] = {"flops_dense": evidence.ledger.dense}
    if checks[0].outcome == "pass" and evidence.saves:
        attack = evidence.white_box(times=LONGER)
        figures |= {
            "flops_clean": float(evidence.clean.flops.mean()),
            "flops_adversarial": float(attack.flops.mean()),
            "recovery_percent": evidence.recovery(attack.flops).value,
            "accuracy_clean": evidence.accuracy(evidence.clean.prediction),
            "accuracy_adversarial": evidence.accuracy(attack.prediction),
        }
    return Diagnosis(tuple(checks), settings, figures)


def doctor(
    network: DynamicNetwork,
    images: Tensor,
    labels: Tensor | None = None,
    settings: Settings | None = None,
    *,
    ledger: FlopsLedger | None = None,
    source: DynamicNetwork | None = None,
) -> Diagnosis:
    """Ask whether what attacks say about a network is to be believed, or whether it hides its gradient.

    Fifteen checks (:data:`CHECKS`), with 95 % bootstrap intervals over images wherever a difference is judged. About ``14 * steps`` passes with a
    gradient and ``2 * steps`` without one per image.

    Args:
        network: the network or defense; mode, parameters and statistics are left as they were.
        images: (n, 3, H, W) in [0, 1]; a hundred or more, since a difference that the choice of images explains decides nothing.
        labels: (n,), for the accuracies that stand beside the checks.
        settings: norm, radius, steps, batch size and seed; ``Settings()`` when left out.
        ledger: prices at the images' resolution; measured on the spot when left out.
        source: a second network, such as the undefended one; adds the check that an attack crafted on it does not do better.

    Raises:
        ValueError: for an invalid image or an argument out of range.

    Example:
        >>> from gatewatt.networks import SkipNet
        >>> network = SkipNet(8, width=4).eval()
        >>> with torch.no_grad():
        ...     _ = network.gating.projection.bias.fill_(50)
        >>> diagnosis = doctor(network, torch.rand(4, 3, 32, 32), settings=Settings(steps=1))
        >>> [check.name for check in diagnosis.failed]
        ['clean saving']
    """
    evidence = Evidence(network, images, labels, settings, ledger=ledger, source=source)
    return conclude(evidence, list(examine(evidence)))
