"""The worst-case benchmark: runs are made once and with the settings asked for, and its tables say what the records say."""

from __future__ import annotations

import csv
import json
import math
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tests.reports.runs import DENSE, write_run
from tests.toys import LEDGER, Logistic
from tests.training import QUIET

from gatewatt.attacks import AutoEnergy
from gatewatt.data import DigitsData
from gatewatt.metrics.record import image_records, read_records, summarize, write_records, write_summary

pytestmark = QUIET
CHECKPOINT = "shallow-deep-resnet-20-digits"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # Scripts import their neighbours as they do when started from the repository root.
    monkeypatch.syspath_prepend("benchmarks")
    return import_module("worst_case")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def write_images(folder: Path, flops: list[float], mse: list[float], clean: float = 0.5 * DENSE) -> None:
    """A run on so many images whose clean passes all spend the same."""
    n = len(flops)
    rows = image_records(
        ids=np.arange(n),
        labels=np.zeros(n, dtype=int),
        prediction_clean=np.zeros(n, dtype=int),
        prediction_adversarial=np.zeros(n, dtype=int),
        prediction_adversarial_8bit=np.zeros(n, dtype=int),
        flops_dense=DENSE,
        flops_clean=np.full(n, clean),
        flops_adversarial=np.array(flops),
        flops_adversarial_8bit=np.array(flops),
        mse_levels2=np.array(mse),
        linf_levels=np.sqrt(mse),
        mse_levels2_8bit=np.array(mse),
        executed_clean=np.zeros((n, 2)),
        executed_adversarial=np.ones((n, 2)),
    )
    named = {"network": "n", "dataset": "digits", "defense": None, "seed": 0, "wall_seconds": 2.0, "versions": {}, "recipe": None}
    write_records(folder / "records.csv", rows)
    write_summary(folder / "summary.json", summarize(rows, attack={"name": "A"}, **named))  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_every_single_attack_stays_in_the_ball_of_the_ensemble(bench: ModuleType, norm: str) -> None:
    eps = 0.3
    images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    network = Logistic().eval()
    for name in bench.SINGLES:
        # The toy has no exits: DeepSloth's substitute.
        attack = bench.single(name, norm, eps, 3, exits=False, pixels=12)
        change = (attack(network, images, ledger=LEDGER).images.double() - images.double()).flatten(1)
        assert (change.abs().max() if norm == "linf" else change.norm(dim=1).max()) <= eps + 1e-6
    assert bench.single("deepsloth", norm, eps, 3, exits=True, pixels=12).target == "exits"
    assert bench.single("pgd-long", norm, eps, 3, exits=True, pixels=12).steps == 27


def test_radii_are_on_the_grids_and_survive_the_name_of_their_folder(bench: ModuleType) -> None:
    for norm, radii in bench.RADII.items():
        assert set(radii) <= set(bench.GRIDS[norm])
        # A quarter of an octave is 1.5 dB.
        steps = [20 * math.log10(larger / smaller) for smaller, larger in pairwise(bench.GRIDS[norm])]
        assert max(steps) < 1.51
        for eps in bench.GRIDS[norm]:
            assert bench.radius_of(bench.radius_text(norm, eps)) == (norm, pytest.approx(eps, rel=1e-3))
        assert len({bench.radius_text(norm, eps) for eps in bench.GRIDS[norm]}) == len(bench.GRIDS[norm])


def test_bisection_finds_the_smallest_that_is_enough(bench: ModuleType) -> None:
    grid = [float(value) for value in range(32)]
    for goal in range(33):
        asked: list[float] = []
        found = bench.smallest(grid, lambda value, goal=goal, asked=asked: asked.append(value) or value >= goal)
        assert found == (goal if goal < 32 else None)
        assert len(asked) <= 6


def test_the_first_table_says_where_a_single_attack_does_better(bench: ModuleType, tmp_path: Path) -> None:
    ball = tmp_path / "net" / "linf-4"
    write_images(ball / "auto", [0.8e6, 0.6e6, 1e6, 0.9e6], [4.0] * 4)
    write_images(ball / "hinge", [0.7e6, 0.7e6, 1e6, 0.8e6], [4.0] * 4)
    write_images(ball / "square", [0.9e6, 0.9e6, 1e6, 1e6], [4.0] * 4)
    # A run that was interrupted counts for nothing.
    (ball / "uniform").mkdir()
    page = bench.render(tmp_path).read_text()
    rows = {row["attack"]: row for row in read_csv(tmp_path / "worst-case.csv")}
    assert list(rows) == ["auto", "hinge", "square"]
    assert float(rows["auto"]["recovery_percent"]) == pytest.approx(65)
    assert (float(rows["hinge"]["ahead"]), rows["hinge"]["beaten"]) == (pytest.approx(5), "1")
    assert (float(rows["square"]["ahead"]), rows["square"]["beaten"]) == (pytest.approx(-25), "3")
    assert float(rows["hinge"]["ahead_low"]) < 5 < float(rows["hinge"]["ahead_high"])
    assert "at least as much as the single attack in 1 of 2 comparisons; not against square on `net` (linf-4, 25.00 points)." in page


def test_gains_at_equal_recovery_are_those_of_the_smallest_radius_that_reaches_it(bench: ModuleType, tmp_path: Path) -> None:
    top = tmp_path / "net"
    # 60 % recovery; the last image wins nothing and is matched with nothing.
    write_images(top / "gradmdm", [0.9e6, 0.8e6, 1e6, 0.5e6], [40.0, 40.0, 40.0, 40.0])
    write_images(top / "l2-0.25" / "auto", [0.9e6, 0.6e6, 0.6e6, 0.5e6], [1.0, 1.0, 1.0, 0.0])
    write_images(top / "l2-0.5" / "auto", [0.95e6, 0.7e6, 1e6, 0.6e6], [4.0, 4.0, 4.0, 4.0])
    write_images(top / "l2-1" / "auto", [1e6, 1e6, 1e6, 1e6], [16.0, 16.0, 16.0, 16.0])
    page = bench.render(tmp_path).read_text()
    (row,) = read_csv(tmp_path / "equal-recovery.csv")
    assert float(row["eps"]) == 0.5
    assert float(row["gain_db"]) == pytest.approx(10)
    assert float(row["psnr_auto"]) == pytest.approx(20 * math.log10(255) - 10 * math.log10(4))
    # Image by image: 40 against 1, 16 and 4.
    assert float(row["matched_gain_db"]) == pytest.approx(10 * math.log10(40 * 40 * 40 / (1 * 16 * 4)) / 3)
    assert (row["matched_images"], row["unmatched_images"]) == ("3", "0")
    assert "at least 3 dB higher in 1 of 1 cases." in page


def test_a_recovery_that_no_radius_reaches_is_said_so(bench: ModuleType, tmp_path: Path) -> None:
    write_images(tmp_path / "net" / "gradmdm", [0.9e6, 0.8e6], [40.0, 40.0])
    write_images(tmp_path / "net" / "linf-8" / "auto", [0.95e6, 0.6e6], [4.0, 4.0])
    page = bench.render(tmp_path).read_text()
    (row,) = read_csv(tmp_path / "equal-recovery.csv")
    assert (row["eps"], row["gain_db"], row["unmatched_images"]) == ("", "", "1")
    assert "in 0 of 1 cases; not on `net` in linf (not reached)." in page


def test_runs_on_other_images_are_not_compared(bench: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path / "net" / "l2-1" / "auto", images=20)
    write_run(tmp_path / "net" / "l2-1" / "hinge", images=20, ids=range(1, 21))
    with pytest.raises(SystemExit, match="hinge holds other images"):
        bench.render(tmp_path)


def test_runs_are_made_once_and_only_with_the_settings_asked_for(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "RADII", {"linf": (8 / 255,), "l2": (1.0,)})
    monkeypatch.setattr(bench, "SINGLES", ("cheapest", "deepsloth", "uniform"))
    monkeypatch.setattr(bench, "GRIDS", {"linf": (8 / 255, 16 / 255), "l2": (1.0,)})
    data = DigitsData(test_images=3)
    bench.examine(CHECKPOINT, data, bench.Settings(3, 2, ("linf",), 100.0, tmp_path))
    ball = tmp_path / CHECKPOINT / "linf-8"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert {path.parent.name for path in written if path.parent.parent == ball} == {"auto", "cheapest", "deepsloth", "uniform"}
    assert json.loads((ball / "deepsloth" / "summary.json").read_text())["attack"]["name"] == "DeepSloth"
    assert json.loads((ball / "auto" / "summary.json").read_text())["attack"]["steps"] == 2
    spent = {name: [row.flops_adversarial for row in read_records(ball / name / "records.csv")] for name in ("auto", "cheapest")}
    assert all(worst >= alone for worst, alone in zip(spent["auto"], spent["cheapest"], strict=True))
    bench.examine(CHECKPOINT, data, bench.Settings(3, 2, ("linf",), 100.0, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")} == written
    with pytest.raises(SystemExit, match="holds a run with other settings"):
        bench.measured(ball / "auto", CHECKPOINT, AutoEnergy("linf", 8 / 255, steps=3), data)
