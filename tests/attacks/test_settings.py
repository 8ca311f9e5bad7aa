"""Records name the attack in full: two attacks that differ in any argument have different settings."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest

from gatewatt.attacks import (
    ILFO,
    Attack,
    AutoEnergy,
    CheapestGateLoss,
    ComplexityLoss,
    ComplexityOnly,
    ConflictMasking,
    DeepSloth,
    EnergyAttack,
    GradAuto,
    GradMDM,
    GradMDMReleased,
    HingeLoss,
    Joint,
    L2Ball,
    Lattice,
    LatticeBall,
    LayerwiseMasking,
    LinfBall,
    Noise,
    NormLoss,
    PowerLoss,
    ProjectedAttack,
    ProjectionSpace,
    SquareSearch,
    StandardizedTanhSpace,
    TanhSpace,
    UniformExitsLoss,
    UnitLength,
    UniversalAttack,
)

OTHER: dict[type[Attack], dict[str, list[Any]]] = {
    EnergyAttack: {
        "loss": [
            ComplexityLoss(),
            ComplexityLoss([0.4, 0.5]),
            PowerLoss(2),
            PowerLoss([2, 3]),
            PowerLoss([2, 4]),
            HingeLoss(),
            HingeLoss(1),
            CheapestGateLoss(),
            NormLoss(),
            NormLoss(2),
        ],
        "direction": [Joint(), ComplexityOnly(), UnitLength(), UnitLength(Joint()), UnitLength(UnitLength(Joint())), LayerwiseMasking(50)],
        "space": [
            TanhSpace(1e-3),
            ProjectionSpace(),
            LinfBall(),
            LinfBall(0.1),
            L2Ball(),
            L2Ball(0.1),
            StandardizedTanhSpace(),
            Lattice(TanhSpace()),
            Lattice(ProjectionSpace()),
            Lattice(LinfBall()),
            LatticeBall(LinfBall()),
            LatticeBall(L2Ball()),
        ],
        "gamma": [1.0],
        "reduction": ["sum"],
        "steps": [9],
        "warmup": [0.1],
        "lr": [0.1],
        "keep": ["best"],
        "decision": ["hard", "straight_through"],
        "prediction_weight": [1.0, 2.0],
        "cross_entropy_weight": [1.0, -1.0],
        "weighing": ["equal"],
        "name": ["mine"],
    },
    GradMDM: {
        "alpha": [1, 2.5, [4.0, 1.0]],
        "gamma": [1.0],
        "steps": [9],
        "warmup": [0.1],
        "lr": [0.1],
        "space": [ProjectionSpace()],
        "keep": ["best"],
        "decision": ["hard"],
        "prediction_weight": [1.0],
    },
    GradMDMReleased: {
        "gamma": [1.0],
        "finished": [50.0],
        "steps": [9],
        "lr": [0.1],
        "mean": [(0.5, 0.5, 0.5)],
        "std": [(0.5, 0.5, 0.4)],
        "decision": ["hard"],
    },
    ILFO: {"thresholds": [[0.4, 0.5], [0.4, 0.6]], "gamma": [1.0], "steps": [9], "lr": [0.1], "keep": ["best"], "decision": ["hard"]},
    GradAuto: {"strength": [0.5], "steps": [9], "lr": [0.1], "keep": ["best"], "decision": ["hard"]},
    ProjectedAttack: {
        "loss": [PowerLoss(), HingeLoss(), HingeLoss(0.2), HingeLoss(0.2, 1.0), CheapestGateLoss(0.2)],
        "direction": [ConflictMasking(), Joint()],
        "space": [LinfBall(0.1), L2Ball(0.1)],
        "steps": [9],
        "first_step": [0.5],
        "restarts": [2],
        "seed": [1],
        "keep": ["last"],
        "decision": ["hard"],
        "name": ["mine"],
    },
    DeepSloth: {"norm": ["l2"], "target": ["halting"], "steps": [9], "eps": [0.1], "seed": [1]},
    Noise: {"kind": ["gaussian", "shift", "flat"], "space": [LinfBall(0.1), L2Ball(0.1)], "seed": [1]},
    SquareSearch: {"space": [LinfBall(0.1), L2Ball(0.1)], "steps": [9], "area": [0.1], "seed": [1]},
    AutoEnergy: {"norm": ["l2"], "eps": [0.1], "steps": [9], "lattice": [True]},
    UniversalAttack: {
        "loss": [HingeLoss(0.2), UniformExitsLoss()],
        "space": [LinfBall(0.1), L2Ball(0.1)],
        "images": [9],
        "steps": [9],
        "step_size": [0.1],
        "momentum": [0.1],
        "decision": ["hard"],
        "name": ["mine"],
    },
}
"""Every attack, and for each of its arguments values other than the default."""

MADE: list[Callable[[], Attack]] = [
    *(lambda kind=kind: kind() for kind in OTHER),  # type: ignore[misc]
    *(
        lambda kind=kind, argument=argument, value=value: kind(**{argument: value})  # type: ignore[misc]
        for kind, arguments in OTHER.items()
        for argument, values in arguments.items()
        for value in values
    ),
]


@pytest.mark.parametrize("kind", OTHER)
def test_every_argument_is_looked_at(kind: type[Attack]) -> None:
    assert set(OTHER[kind]) == set(inspect.signature(kind).parameters)


def test_settings_tell_all_attacks_apart() -> None:
    # An EnergyAttack as it comes is GradMDM under another name, and so are its steps; names are part of the settings.
    told = [json.dumps(make().settings, sort_keys=True) for make in MADE]
    assert len(MADE) > 70
    assert len(set(told)) == len(told)


@pytest.mark.parametrize("make", MADE)
def test_settings_are_plain_and_equal_for_equal_attacks(make: Callable[[], Attack]) -> None:
    settings = make().settings
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings == make().settings
    assert settings["name"] == make().name
    # What a callback prints is what it is, not where it lies in memory.
    assert "0x" not in repr(make())
    assert repr(make()).startswith(make().name)


def test_a_part_of_ones_own_is_described_too() -> None:
    class Weighted(HingeLoss):
        def __init__(self, levels: list[float], inner: HingeLoss, note: str | None = None) -> None:
            super().__init__()
            self.levels, self.inner, self.note, self.table = levels, inner, note, {"a": (1, 2)}

    described = EnergyAttack(Weighted([0.1, 0.2], HingeLoss(0.0))).settings["loss"]
    inner = {"kind": "HingeLoss", "margin": 0.0, "temperature": 0.0}
    assert described == {"kind": "Weighted", "margin": 0.1, "temperature": 0.0, "levels": [0.1, 0.2], "inner": inner, "table": {"a": [1, 2]}}
