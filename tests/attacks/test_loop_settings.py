"""The loop: which images, networks and settings it refuses, and what it records of itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.toys import LEDGER, Detached, Rooted, Ungated
from torch import Tensor

from gatewatt.attacks import (
    ComplexityLoss,
    EnergyAttack,
    GradMDM,
    Joint,
    LinfBall,
    NoGradientError,
    ProjectionSpace,
    TanhSpace,
)
from gatewatt.flops import FlopsLedger, price
from gatewatt.networks import SkipNet

# ---- what is refused ----


def spoiled(value: float) -> Tensor:
    images = torch.full((3, 3, 8, 8), 0.5)
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (spoiled(1.5), None, r"images must be in \[0, 1\]; image 1 of the batch spans 0.5 to 1.5"),
        (spoiled(-0.1), None, r"images must be in \[0, 1\]; image 1 of the batch spans -0.1 to 0.5"),
        (spoiled(torch.nan), None, "images must be finite; image 1 of the batch"),
        (torch.rand(3, 8, 8), None, r"shape \(B, 3, H, W\) with B, H, W >= 1, got \(3, 8, 8\)"),
        (torch.rand(0, 3, 8, 8), None, r"got \(0, 3, 8, 8\)"),
        (torch.rand(2, 1, 8, 8), None, r"got \(2, 1, 8, 8\)"),
        (torch.rand(3, 3, 8, 8), torch.zeros(2, dtype=torch.long), r"labels must have shape \(3,\), one per image, got \(2,\)"),
        (torch.rand(3, 3, 8, 8), torch.zeros(3, 10), r"labels must have shape \(3,\), one per image, got \(3, 10\)"),
    ],
    ids=["above", "below", "nan", "no batch", "empty", "grey", "too few labels", "one-hot labels"],
)
def test_bad_input_is_refused_in_one_line(images: Tensor, labels: Tensor | None, message: str, network: SkipNet) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GradMDM(steps=1)(network, images, labels)
    assert "\n" not in str(caught.value)


def test_bytes_are_refused(network: SkipNet) -> None:
    with pytest.raises(TypeError, match=r"floating-point tensor in \[0, 1\], got torch.uint8"):
        GradMDM(steps=1)(network, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("ledger", [None, LEDGER])
def test_a_network_without_gates_is_refused(ledger: FlopsLedger | None) -> None:
    with pytest.raises(ValueError, match="returned no gates: it computes the same for every image"):
        GradMDM(steps=1)(Ungated(), torch.rand(2, 3, 8, 8), ledger=ledger)


def test_a_network_of_nan_is_refused(network: SkipNet, images: Tensor) -> None:
    ledger = price(network, images[:1])
    with torch.no_grad():
        network.gating.projection.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="hold NaN or infinity for image 0 of the batch"):
        GradMDM(steps=1)(network, images, ledger=ledger)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_an_attack_that_ran_into_nan_returns_no_images(keep: Any) -> None:
    network, images = Rooted(), torch.full((3, 3, 8, 8), 0.5)
    images[1] = 0.0
    with pytest.raises(ValueError, match=r"image 1 of the batch met a gradient that is NaN or infinite"):
        GradMDM(steps=2, space=ProjectionSpace(), keep=keep)(network, images, ledger=price(network, images[:1]))


@pytest.mark.parametrize("prediction_weight", [0.0, 1.0])
def test_scores_without_a_gradient_are_refused(prediction_weight: float) -> None:
    with pytest.raises(NoGradientError, match="no gradient leads from the network's scores to its images.*SquareSearch"):
        GradMDM(steps=2, prediction_weight=prediction_weight)(Detached().eval(), torch.rand(2, 3, 2, 2), ledger=LEDGER)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1.0}, "gamma must be .*at least 0, got -1.0"),
        ({"gamma": float("nan")}, "gamma must be .*at least 0, got nan"),
        ({"gamma": INFINITE}, "gamma must be finite and at least 0, got inf"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"warmup": -0.1}, r"warmup must be in \[0, 1\], a fraction of the steps, got -0.1"),
        ({"warmup": 20}, "warmup must be in .* got 20"),
        ({"lr": 0.0}, "lr must be .*positive, got 0.0"),
        ({"lr": INFINITE}, "lr must be finite and positive, got inf"),
        ({"reduction": "none"}, "reduction must be mean or sum and keep last or best, got 'none' and 'last'"),
        ({"keep": "first"}, "reduction must be mean or sum and keep last or best, got 'mean' and 'first'"),
        ({"decision": "soft"}, "decision must be one of .*got 'soft'"),
        ({"prediction_weight": -1.0}, "prediction_weight must be finite and at least 0, got -1.0"),
        ({"prediction_weight": INFINITE}, "prediction_weight must be finite and at least 0, got inf"),
        ({"cross_entropy_weight": -INFINITE}, "cross_entropy_weight must be finite, got -inf"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_refused_when_the_attack_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnergyAttack(**settings)


@pytest.mark.parametrize("alpha", [0.99, -4, float("nan")])
def test_an_alpha_below_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"alpha must be .*at least 1 .*\(Eq. 7\), got"):
        GradMDM(alpha)


# ---- what is recorded ----


def test_the_defaults_are_the_papers() -> None:
    assert GradMDM().settings == {
        "name": "GradMDM",
        "gamma": 100.0,
        "reduction": "mean",
        "steps": 100,
        "warmup": 0.2,
        "lr": 0.01,
        "keep": "last",
        "decision": None,
        "prediction_weight": 0.0,
        "cross_entropy_weight": 0.0,
        "weighing": "flops",
        "loss": {"kind": "PowerLoss", "alpha": 4.0},
        "direction": {"kind": "ConflictMasking"},
        "space": {"kind": "TanhSpace", "margin": 1e-4},
    }


DIFFERENT: list[Callable[[], EnergyAttack]] = [
    GradMDM,
    lambda: GradMDM(2),
    lambda: GradMDM(3),
    lambda: GradMDM(2.5),
    lambda: GradMDM(gamma=1),
    lambda: GradMDM(steps=99),
    lambda: GradMDM(warmup=0.1),
    lambda: GradMDM(lr=0.02),
    lambda: GradMDM(keep="best"),
    lambda: GradMDM(decision="hard"),
    lambda: GradMDM(space=ProjectionSpace()),
    lambda: GradMDM(space=TanhSpace(1e-3)),
    lambda: GradMDM(space=LinfBall(4 / 255)),
    lambda: GradMDM(space=LinfBall(8 / 255)),
    lambda: GradMDM(space=LinfBall(1)),
    lambda: EnergyAttack(reduction="sum"),
    lambda: EnergyAttack(ComplexityLoss()),
    lambda: EnergyAttack(direction=Joint()),
]


def test_settings_are_plain_and_tell_attacks_apart() -> None:
    described = [make().settings for make in DIFFERENT]
    for settings in described:
        assert json.loads(json.dumps(settings, allow_nan=False)) == settings
    # The label aside: two attacks that share a name must still differ in what they do.
    told = {json.dumps({key: value for key, value in settings.items() if key != "name"}, sort_keys=True) for settings in described}
    assert len(told) == len(DIFFERENT)


@pytest.mark.parametrize("make", DIFFERENT)
def test_equal_attacks_have_equal_settings(make: Callable[[], EnergyAttack]) -> None:
    assert make().settings == make().settings


def test_a_whole_alpha_is_the_same_attack_as_its_float() -> None:
    assert GradMDM(4).settings == GradMDM(4.0).settings


def test_a_name_is_a_label() -> None:
    assert EnergyAttack(name="mine").settings["name"] == "mine"
    assert repr(EnergyAttack(name="mine", gamma=2.5, steps=7)) == "mine(gamma=2.5, steps=7)"
    assert repr(GradMDM()) == "GradMDM(gamma=100, steps=100)"
