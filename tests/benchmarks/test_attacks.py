"""The speed benchmark: every attack that fits a network is timed, and the tables are those of the files."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gatewatt.flops import price
from gatewatt.networks import SkipNet


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Scripts import their neighbours as they do when started from the repository root.
    monkeypatch.syspath_prepend("benchmarks")
    return import_module("attacks")


def test_a_row_is_the_time_of_whole_attacks(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    network, images = SkipNet(8, width=4).eval(), torch.rand(2, 3, 32, 32)
    kept = ("GradMDM", "ILFO", "GradMDMReleased", "DeepSloth, L2", "Noise")
    monkeypatch.setattr(bench, "ATTACKS", {name: bench.ATTACKS[name] for name in kept})
    monkeypatch.setattr(
        bench, "interleaved", lambda cases, **_: {name: case() or (0.5 if name == "yardstick" else 4.0) for name, case in cases.items()}
    )
    found = bench.speed(network, images, price(network, images[:1]), 2, 1)
    rows = {row["attack"]: row for row in found["speed"]}
    # A SkipNet has blocks that are skipped whole, and no exits.
    assert set(rows) == {"GradMDM", "ILFO", "GradMDMReleased", "Noise"}
    assert found["passes_per_second"] == 2 / 0.25
    # Two steps in 4 seconds: 100 steps of two images take 200.
    assert (rows["GradMDM"]["images_per_second"], rows["GradMDM"]["ratio"]) == (2 / 200, 8)
    assert rows["ILFO"]["images_per_second"] == 2 / 600
    # Noise has one step.
    assert rows["Noise"]["images_per_second"] == 2 / 4


def test_a_recovery_that_is_reached_at_once_takes_no_step_and_one_out_of_reach_is_said_so(bench: ModuleType) -> None:
    torch.manual_seed(0)
    network, images = SkipNet(8, width=4).eval(), torch.rand(2, 3, 32, 32)
    ledger = price(network, images[:1])
    options = Namespace(gamma=1.0, budget=2, rounds=1, recovery=0.0)
    rows = bench.race(network, images, ledger, options)
    assert (rows[0]["algorithm"], rows[0]["step"]) == ("GradMDM", 0)
    options.recovery = 101.0
    assert {row["seconds"] for row in bench.race(network, images, ledger, options)} == {None}


def test_the_tables_are_rendered_from_the_files(bench: ModuleType, tmp_path: Path) -> None:
    base = {"machine": "m", "images": 4, "source": "noise", "rounds": 3, "timed_steps": 10, "passes_per_second": 80.0}
    base |= {"goal_percent": 50.0, "gamma": 1.0, "budget": 100}
    row = {"attack": "GradMDM", "steps": 100, "images_per_second": 1.5, "ratio": 1.25, "seconds": 3.0}
    race = [
        {"algorithm": "GradMDM", "seconds": 2.0, "step": 7, "mse_levels2": 3.5},
        {"algorithm": "GradMDMReleased", "seconds": None, "step": None, "mse_levels2": None},
    ]
    (tmp_path / "b.json").write_text(json.dumps({"network": "b", **base, "speed": [row], "race": race}))
    (tmp_path / "a.json").write_text(json.dumps({"network": "a", **base, "speed": [row], "race": []}))
    page = bench.render(tmp_path).read_text()
    assert "| GradMDM | 100 | 1.50 | 1.25 |" in page
    assert "| GradMDM | 2.00 | 7 | 3.500 |" in page
    assert "| GradMDMReleased | not reached | not reached | not reached |" in page
    assert page.index("## a") < page.index("## b")
    assert page.count("To 50 % recovery") == 1
    with (tmp_path / "attacks.csv").open() as stream:
        assert [(line["network"], line["images_per_second"]) for line in csv.DictReader(stream)] == [("a", "1.5"), ("b", "1.5")]


def test_digits_are_shown_to_a_network_trained_on_them(bench: ModuleType) -> None:
    images, source = bench.pictures("dvt-small-digits", None, 3)
    assert (tuple(images.shape), source) == ((3, 3, 32, 32), "digits")
    images, source = bench.pictures(None, None, 3)
    assert (tuple(images.shape), source) == ((3, 3, 32, 32), "noise")
    assert torch.equal((255 * images).round() / 255, images)
