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
    network = nn.Linear(1, 1, bias=False)
    configured = optimization.configure(network, steps)
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    assert schedule["interval"] == "step"
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        network.weight.grad = torch.ones(1, 1)
        optimizer.step()
        schedule["scheduler"].step()
    return [*found, optimizer.param_groups[0]["lr"]]


def test_constant_is_constant() -> None:
    assert rates(Optimization(lr=0.3, schedule="constant"), 7) == [0.3] * 8


@pytest.mark.parametrize("steps", [1, 2, 10, 64])
def test_cosine_ends_at_zero(steps: int) -> None:
    expected = [0.3 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps + 1)]
    assert rates(Optimization(lr=0.3, schedule="cosine"), steps) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 10, 64])
@pytest.mark.parametrize("warmup", [0, 0.25, 0.9])
def test_warmup_cosine_rises_in_a_line_and_falls_to_its_floor(warmup: float, steps: int) -> None:
    rising = min(round(warmup * steps), steps - 1)
    line = [0.3 * (1e-3 + (1 - 1e-3) * step / rising) for step in range(rising)]
    fall = [0.01 + 0.29 * (1 + math.cos(math.pi * step / (steps - rising))) / 2 for step in range(steps - rising + 1)]
    found = rates(Optimization(lr=0.3, schedule="warmup_cosine", warmup=warmup, final_lr=0.01), steps)
    assert found == pytest.approx([*line, *fall], abs=1e-12)


def test_a_resumed_warmup_cosine_goes_on_where_it_was() -> None:
    optimization = Optimization(lr=0.3, schedule="warmup_cosine", warmup=0.4)
    whole = rates(optimization, 10)
    for step in range(1, 10):
        first, second = (optimization.configure(nn.Linear(1, 1), 10) for _ in range(2))
        for _ in range(step):
            first["optimizer"].step()
            first["lr_scheduler"]["scheduler"].step()
        for part in ("optimizer", "lr_scheduler"):
            old, new = (run[part] if part == "optimizer" else run[part]["scheduler"] for run in (first, second))  # type: ignore[literal-required]
            new.load_state_dict(old.state_dict())
        for expected in whole[step:-1]:
            assert second["optimizer"].param_groups[0]["lr"] == expected
            second["optimizer"].step()
            second["lr_scheduler"]["scheduler"].step()
        assert second["lr_scheduler"]["scheduler"].total_steps == 11


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


def test_optimizers_get_their_settings() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    sgd = Optimization(lr=0.2, momentum=0.8, weight_decay=1e-3, nesterov=True).configure(network, 5)["optimizer"]
    assert type(sgd) is torch.optim.SGD
    expected = {"lr": 0.2, "momentum": 0.8, "weight_decay": 1e-3, "nesterov": True}
    assert {key: sgd.defaults[key] for key in expected} == expected
    adam, adamw = (Optimization(kind, 1e-3, momentum=0.7, weight_decay=0.05).configure(network, 5)["optimizer"] for kind in ("adam", "adamw"))
    assert (type(adam), type(adamw)) == (torch.optim.Adam, torch.optim.AdamW)
    for optimizer in (adam, adamw):
        assert (optimizer.defaults["betas"], optimizer.defaults["weight_decay"]) == ((0.7, 0.999), 0.05)
    for optimizer in (sgd, adam, adamw):
        assert [group["params"] for group in optimizer.param_groups] == [list(network[0].parameters())]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_what_is_named_in_no_decay_keeps_its_weights(optimizer: Any) -> None:
    network = nn.ModuleDict({"conv": nn.Conv2d(2, 2, 3), "norm": nn.BatchNorm2d(2), "mask": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)})
    network["frozen"].requires_grad_(False)
    for patterns, kept in {
        (): {"frozen.weight", "frozen.bias"},
        ("vectors",): {"conv.bias", "norm.weight", "norm.bias", "mask.bias", "frozen.weight", "frozen.bias"},
        ("mask.*",): {"mask.weight", "mask.bias", "frozen.weight", "frozen.bias"},
        ("vectors", "*ask.*"): {"conv.bias", "norm.weight", "norm.bias", "mask.weight", "mask.bias", "frozen.weight", "frozen.bias"},
    }.items():
        for parameter in network.parameters():
            parameter.data.fill_(1)
            parameter.grad = torch.zeros_like(parameter)
        configured = Optimization(optimizer, 0.1, weight_decay=0.5, no_decay=patterns).configure(network, 5)
        configured["optimizer"].step()
        assert {name for name, parameter in network.named_parameters() if bool((parameter == 1).all())} == kept


def test_a_pattern_that_names_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no_decay: no parameter of Linear is named '\*.mask.\*'; one is 'weight'"):
        Optimization(no_decay=["*.mask.*"]).configure(nn.Linear(2, 2), 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of sgd, adam, adamw, got 'lion'"),
        ({"schedule": "linear"}, "schedule must be one of one_cycle, step, cosine, warmup_cosine, constant, got 'linear'"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "lr must be positive"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\)"),
        ({"weight_decay": -1e-4}, "weight_decay at least 0"),
        ({"final_lr": 0.1}, "final_lr must be at least 0 and below lr 0.1, got 0.1"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"milestones": (0.5, 32_000)}, r"milestones in \(0, 1\), fractions of the run, got 0.3 and \(0.5, 32000\)"),
        ({"milestones": (0.0,)}, "fractions of the run"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Optimization(**settings)
