"""How differences between attacks are judged: FLOPs are given by hand, so every outcome can be made."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.toys import LEDGER, Logistic

from gatewatt.diagnosis import Evidence, Settings, strength
from gatewatt.diagnosis.evidence import LONGER, Attacked, Passes

N = 40
CLEAN = np.full(N, 80.0)  # of 180: 100 to be recovered of each image


def attacked(
    flops: Sequence[float] | float, *, rounded: float | None = None, outside: float = 0.0, beyond: float = 0.0, obstacle: str | None = None
) -> Attacked:
    column = np.broadcast_to(np.asarray(flops, dtype=float), (N,)).copy()
    return Attacked(column, column if rounded is None else np.full(N, rounded), np.zeros(N), outside, beyond, obstacle)


def evidence(clean: np.ndarray = CLEAN, **white: Attacked) -> Evidence:
    """Evidence with clean FLOPs, and with attacks at ``half``, ``own``, ``twice`` and ``four`` times the radius, ``unbounded`` and ``long``."""
    images = torch.full((N, 3, 2, 2), 0.5)
    found = Evidence(Logistic().eval(), images, settings=Settings(eps=0.1, steps=10), ledger=LEDGER)
    found.__dict__["clean"] = Passes(clean, np.zeros((N, 5), dtype=bool), np.zeros(N))
    keys = {"half": (0.05, 10), "own": (0.1, 10), "twice": (0.2, 10), "four": (0.4, 10), "unbounded": (1.0, 10 * LONGER), "long": (0.1, 10 * LONGER)}
    found._white.update({keys[name]: attack for name, attack in white.items()})
    found.highest = max([clean.max(), *(attack.flops.max() for attack in white.values())])
    return found


def sweep(*flops: Sequence[float] | float) -> Evidence:
    return evidence(**{name: attacked(value) for name, value in zip(("half", "own", "twice", "four", "unbounded"), flops, strict=False)})


SCATTERED = [90.0, 110.0] * (N // 2)


@pytest.mark.parametrize(
    ("flops", "outcome"),
    [((90, 100, 110, 120), "pass"), ((90, 100, 99.5, 120), "pass"), ((90, 100, 95, 120), "fail"), ((80, 80, 80, 80), "cannot tell")],
)
def test_recovery_may_not_fall_with_the_radius(flops: tuple[float, ...], outcome: str) -> None:
    assert strength.grows_with_epsilon(sweep(*flops)).outcome == outcome


def test_a_fall_that_the_choice_of_images_explains_decides_nothing() -> None:
    finding = strength.grows_with_epsilon(sweep(90, SCATTERED, [108.0, 87.0] * (N // 2), 120))
    assert finding.outcome == "cannot tell"
    assert "falls by 2.5 points" in finding.reason


@pytest.mark.parametrize(("unbounded", "outcome"), [(180, "pass"), (172, "pass"), (150, "fail"), (80, "fail")])
def test_an_unbounded_attack_must_come_near_what_some_input_reached(unbounded: float, outcome: str) -> None:
    found = sweep(80, 80, 80, 80, unbounded)
    found.highest = 180.0
    finding = strength.unbounded_attack(found)
    assert finding.outcome == outcome
    assert finding.figures["recovery_of_reachable_percent"] == pytest.approx(unbounded - 80)


def test_what_a_smaller_ball_held_counts_for_the_unbounded_attack() -> None:
    assert strength.unbounded_attack(sweep(80, 80, 180, 80, 80)).figures["recovery_of_reachable_percent"] == 100


@pytest.mark.parametrize(("long", "outcome"), [(101, "pass"), (102, "pass"), (105, "fail"), (95, "pass")])
def test_more_steps_may_not_find_much_more(long: float, outcome: str) -> None:
    assert strength.steps_suffice(evidence(own=attacked(100), long=attacked(long))).outcome == outcome
    nothing = strength.steps_suffice(evidence(own=attacked(80), long=attacked(80, obstacle="no gradient leads to the image")))
    assert (nothing.outcome, nothing.reason) == ("cannot tell", "no gradient leads to the image")


@pytest.mark.parametrize(
    ("attack", "noise", "outcome"), [(100, 90, "pass"), (90, 100, "fail"), (80, 80, "cannot tell"), (SCATTERED, 99, "cannot tell")]
)
def test_noise_must_recover_less(attack: Sequence[float] | float, noise: float, outcome: str) -> None:
    found = evidence(own=attacked(attack))
    found.__dict__["noises"] = {"uniform": attacked(80), "shift": attacked(noise)}
    finding = strength.beats_noise(found)
    assert finding.outcome == outcome
    assert finding.figures["noise_recovery_percent"] == {"uniform": 0, "shift": noise - 80}


@pytest.mark.parametrize(
    ("attack", "search", "outcome"),
    [(100, 90, "pass"), (99.5, 100, "pass"), (95, 100, "fail"), (80, 80, "cannot tell"), (SCATTERED, 102, "cannot tell")],
)
def test_chance_must_not_find_more_than_gradients(attack: Sequence[float] | float, search: float, outcome: str) -> None:
    found = evidence(own=attacked(attack))
    found.__dict__["search"] = attacked(search)
    assert strength.beats_search(found).outcome == outcome


@pytest.mark.parametrize(("rounded", "outcome"), [(119, "pass"), (112, "pass"), (100, "fail")])
def test_rounding_may_take_little(rounded: float, outcome: str) -> None:
    assert strength.survives_8bit(evidence(long=attacked(120, rounded=rounded))).outcome == outcome
    assert strength.survives_8bit(evidence(long=attacked(80, rounded=80))).outcome == "cannot tell"


@pytest.mark.parametrize(
    ("outside", "beyond", "outcome"), [(0, 1e-7, "pass"), (1e-3, 0, "fail"), (0, 1e-3, "fail"), (math.nan, 0, "fail"), (0, math.nan, "fail")]
)
def test_every_adversarial_image_is_looked_at(outside: float, beyond: float, outcome: str) -> None:
    found = evidence()
    assert strength.images_valid(found).outcome == "cannot tell"
    found.made += [attacked(100), attacked(100, outside=outside, beyond=beyond), attacked(100)]
    assert strength.images_valid(found).outcome == outcome


def test_where_nothing_is_saved_nothing_is_attacked() -> None:
    found = evidence(clean=np.full(N, 180.0))
    checks = (strength.grows_with_epsilon, strength.unbounded_attack, strength.steps_suffice, strength.beats_noise, strength.beats_search)
    assert {check(found).outcome for check in (*checks, strength.survives_8bit)} == {"cannot tell"}
    assert found.made == []
