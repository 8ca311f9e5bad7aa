"""Schedules step by step, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gatewatt.tasks import Optimization


def rates(optimization: Optimization, steps: int) -> list[float]:
    """The learning rate of each step, and the one that is left afterwards."""
    parameter = nn.Parameter(torch.ones(1))
    configured = optimization.configure([parameter], steps)
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    assert schedule["interval"] == "step"
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        parameter.grad = torch.ones(1)
        optimizer.step()
        schedule["scheduler"].step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_constant_is_constant() -> None:
    assert rates(Optimization(lr=0.3, schedule="constant"), 7) == [0.3] * 8


@pytest.mark.parametrize("steps", [1, 2, 10, 64])
def test_cosine_ends_at_zero(steps: int) -> None:
    expected = [0.3 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps + 1)]
    assert rates(Optimization(lr=0.3, schedule="cosine"), steps) == pytest.approx(expected, abs=1e-12)


def test_step_drops_tenfold_at_each_milestone() -> None:
    assert rates(Optimization(lr=0.1), 64) == pytest.approx([0.1] * 32 + [0.01] * 16 + [0.001] * 17)
    assert rates(Optimization(lr=0.1, milestones=(0.9,)), 10) == pytest.approx([0.1] * 9 + [0.01] * 2)


@pytest.mark.parametrize("steps", [1, 4, 9, 20, 99])
@pytest.mark.parametrize("warmup", [0, 0.1, 0.3, 0.5, 0.9])
def test_one_cycle_rises_to_its_peak_and_ends_at_next_to_nothing(warmup: float, steps: int) -> None:
    found = rates(Optimization(lr=0.4, schedule="one_cycle", warmup=warmup), steps)
    assert max(found) <= 0.4 + 1e-12
    assert found[-1] == pytest.approx(0.4 / 25 / 1e4)
    peak = found.index(max(found))
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    if steps >= 20:
        assert max(found) == pytest.approx(0.4, rel=0.05)
        assert peak == pytest.approx(warmup * steps, abs=1.5)


def test_sgd_and_adamw_get_their_settings() -> None:
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    parameters = [nn.Parameter(torch.ones(1)), frozen]
    sgd = Optimization(lr=0.2, momentum=0.8, weight_decay=1e-3, nesterov=True).configure(parameters, 5)["optimizer"]
    assert type(sgd) is torch.optim.SGD
    expected = {"lr": 0.2, "momentum": 0.8, "weight_decay": 1e-3, "nesterov": True}
    assert {key: sgd.defaults[key] for key in expected} == expected
    adamw = Optimization("adamw", 1e-3, momentum=0.7, weight_decay=0.05).configure(parameters, 5)["optimizer"]
    assert type(adamw) is torch.optim.AdamW
    assert (adamw.defaults["betas"], adamw.defaults["weight_decay"]) == ((0.7, 0.999), 0.05)
    for optimizer in (sgd, adamw):
        assert optimizer.param_groups[0]["params"] == parameters[:1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer must be sgd or adamw, got 'adam'"),
        ({"schedule": "linear"}, "schedule must be one_cycle, step, cosine or constant, got 'linear'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "weight_decay at least 0"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"milestones": (0.5, 32_000)}, r"milestones in \(0, 1\), fractions of the run, got 0.3 and \(0.5, 32000\)"),
        ({"milestones": (0.0,)}, "fractions of the run"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimization(**settings)
