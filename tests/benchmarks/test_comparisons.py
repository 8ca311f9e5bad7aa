"""The benchmarks of defended networks, each in its smallest form: what they write, reuse, refuse and print."""

from __future__ import annotations

import csv
import importlib
import json
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.training import QUIET, skipnet

from gatewatt.defenses import BudgetGuard
from gatewatt.flops import price
from gatewatt.gating import forced
from gatewatt.networks.checkpoint import load, save
from gatewatt.recipes import load_recipes

pytestmark = [*QUIET, pytest.mark.timeout(300)]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A benchmark by name, imported as it is run: beside its neighbours."""

    def _script(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
        return importlib.import_module(name)

    return _script


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """An untrained network in a file, of seed 3."""
    save(skipnet(depth=14), tmp_path / "plain.safetensors", card={"seed": 3})
    return str(tmp_path / "plain.safetensors")


# ---- training.py ----


def test_a_ratio_compares_within_a_round(script: Any) -> None:
    found = script("training").ratios({"clean": [1.0, 10.0, 2.0], "attacked": [3.0, 20.0, 8.0]})
    assert found == {"clean": 1.0, "attacked": 3.0}


def test_training_is_timed_and_measured(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--network", "network/skipnet-20-small", "--data", "digits", "--batch", "4", "--steps", "1", "--rounds", "1"]
    script("training").main([*small, "--cases", "cached, 2 steps", "--measure", "4", "--train", "1", "--attack-steps", "1"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("clean  ", "cached, 2 steps  "))]
    assert [line.split("  ")[0] for line in printed] == ["clean", "cached, 2 steps"] * 2
    assert float(printed[0].split()[-1]) == 1
    assert float(printed[1].split()[-1]) > 0
    assert "%" in printed[3]


def test_every_case_is_a_task_from_the_same_weights(script: Any) -> None:
    training = script("training")
    tasks = [training.task_of(fragments, "network/skipnet-20-small", None) for fragments in training.CASES.values()]
    assert type(tasks[0]).__name__ == "DynamicTraining"
    assert {type(task).__name__ for task in tasks[1:]} == {"EnergyAdversarialTraining"}
    assert len({str(task.attack.settings) for task in tasks[1:]}) >= 4
    for task in tasks[1:]:
        assert all(bool((tensor == tasks[0].network.state_dict()[name]).all()) for name, tensor in task.network.state_dict().items())


def test_noise_will_do_and_is_the_same_every_time(script: Any) -> None:
    data = [script("training").data_of("noise", 4, 2) for _ in range(2)]
    first, second = (next(iter(each.train_dataloader())) for each in data)
    assert first.images.shape == (4, 3, 32, 32)
    assert bool((first.images == second.images).all())


# ---- robustness.py ----


SMALL = ["--images", "4", "--steps", "1"]


def test_every_pair_leaves_a_run_and_the_page_comes_from_the_runs(
    script: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    robustness = script("robustness")
    out = tmp_path / "out"
    asked = ["--out", str(out), *SMALL, "--attacks", "gradmdm", "accuracy-linf-4", "--checkpoints", checkpoint, "--guards", f"{checkpoint}=0.7"]
    robustness.main(asked)
    folders = {path.parent.relative_to(out).as_posix() for path in out.rglob("summary.json")}
    assert folders == {f"{network}/seed3/{attack}" for network in ("plain", "plain+guard") for attack in ("gradmdm", "accuracy-linf-4")}
    capped = json.loads((out / "plain+guard/seed3/gradmdm/summary.json").read_text())
    assert capped["flops_adversarial_max"] <= capped["defense"]["certificate"] <= 0.7 * capped["flops_dense"]

    page = (out / "ROBUSTNESS.md").read_text()
    with (out / "robustness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    assert page.count("| plain |") == page.count("| plain+guard of 70.0 % |") == 2
    summary = json.loads((out / "plain/seed3/gradmdm/summary.json").read_text())
    row = next(row for row in rows if (row["network"], row["attack"]) == ("plain", "gradmdm"))
    assert float(row["flops_adversarial_max"]) == summary["flops_adversarial_max"]
    assert float(row["flops_adversarial_p95"]) == pytest.approx(summary["flops_adversarial_p95"])
    assert float(row["accuracy_clean_percent"]) == pytest.approx(100 * summary["accuracy_clean"])
    assert f"| {float(row['mse_levels2']):.1f} | 4 |" in page

    def measured_again(*arguments: object) -> None:
        raise AssertionError("what is there was measured again")

    monkeypatch.setattr(script("contestants"), "run_attack", measured_again)
    robustness.main(asked)
    assert (out / "ROBUSTNESS.md").read_text() == page
    robustness.main([*asked, "--twins", "plain"])
    first, second = (out / "ROBUSTNESS.md").read_text().split("Against the undefended twin under ")
    assert page.startswith(first.rstrip())
    beside = [[cell.strip() for cell in line.split("|")[1:-1]] for line in second.splitlines() if line.startswith("| plain")]
    assert [cells[:3] for cells in beside] == [["plain+guard", "plain", attack] for attack in ("gradmdm", "accuracy-linf-4")]
    pair = [next(row for row in rows if (row["network"], row["attack"]) == (network, "gradmdm")) for network in ("plain", "plain+guard")]
    theirs, ours = ({key: float(row[key]) for key in row if key not in ("network", "attack", "seed")} for row in pair)
    assert beside[0][4] == f"{ours['flops_adversarial'] / theirs['flops_adversarial']:.2f}"
    assert beside[0][5] == f"{100 * (ours['flops_clean'] - theirs['flops_clean']) / theirs['flops_dense']:+.1f}"
    assert beside[0][7] == f"{ours['routes_clean'] / theirs['routes_clean']:.2f}"
    assert beside[0][8] == f"{ours['accuracy_clean_percent'] - theirs['accuracy_clean_percent']:+.1f}"
    with pytest.raises(SystemExit, match="holds no runs of other; there are plain, plain\\+guard"):
        robustness.main([*asked, "--twins", "other"])
    with pytest.raises(SystemExit, match="gradmdm holds a run of another attack; remove it, or choose another --out"):
        robustness.main([*asked, "--steps", "2"])
    save(skipnet(5, depth=14), checkpoint, card={"seed": 3}, overwrite=True)
    with pytest.raises(SystemExit, match="gradmdm holds a run of another sha256; remove it"):
        robustness.main(asked)


def test_a_family_is_trained_once_and_the_static_network_gets_the_worst_case(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    robustness, commands = script("robustness"), []

    def fit(words: list[str]) -> int:
        commands.append(words)
        recipe, folder, seed = words[2], Path(words[words.index("--run") + 1]), int(words[words.index("--data.seed") + 1])
        static = {"name": "FixedRoute", "open_gates": ["block2"]} if recipe.endswith("static") else None
        save(skipnet(seed, depth=14), folder / f"{recipe}.safetensors", card={"seed": seed, "defense": static})
        return 0

    monkeypatch.setattr(script("contestants"), "gatewatt", fit)
    asked = ["--out", "out", *SMALL, "--attacks", "gradmdm", "--train", "net", "--seeds", "1", "2"]
    robustness.main(asked)
    robustness.main(asked)
    assert [words[2] for words in commands] == ["net", "net-robust", "net-accuracy", "net-static"] * 2
    found = {folder.name: json.loads((folder / "seed1/gradmdm/summary.json").read_text()) for folder in Path("out").iterdir() if folder.is_dir()}
    assert found.keys() == {"net", "net-robust", "net-accuracy", "net-static", "net+guard"}
    worst = found["net-robust"]["flops_adversarial"] / found["net-robust"]["flops_dense"]
    assert float(commands[3][commands[3].index("--model.budget") + 1]) == pytest.approx(worst, abs=1e-4)
    assert found["net+guard"]["defense"]["budget"] == pytest.approx(worst, abs=1e-4)
    assert found["net-static"]["flops_clean"] == found["net-static"]["flops_adversarial"] == found["net-static"]["flops_dense"]
    page = Path("out/ROBUSTNESS.md").read_text()
    assert page.count("| net | gradmdm |") == 4
    static = next(line for line in page.splitlines() if line.startswith("| net-static |"))
    assert [cell.strip() for cell in static.split("|")][2] == "2"
    # A share of what the network could spend, not of its own route.
    share = 100 * found["net-static"]["flops_dense"] / found["net"]["flops_dense"]
    assert f"{share:.1f} % ({share:.1f} to {share:.1f})" in static


def test_gradmdm_is_compared_at_equal_mse(script: Any, checkpoint: str, tmp_path: Path) -> None:
    robustness, out = script("robustness"), tmp_path / "out"
    gammas = ["gradmdm", "gradmdm-300", "gradmdm-1000"]
    asked = ["--out", str(out), "--images", "8", "--steps", "4", "--checkpoints", checkpoint, "--guards", f"{checkpoint}=0.7", "--twins", "plain"]
    robustness.main([*asked, "--attacks", *gammas])
    page = (out / "ROBUSTNESS.md").read_text()
    lines = page.partition("GradMDM at equal MSE")[2].splitlines()
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| plain")]
    with (out / "robustness.csv").open() as file:
        reached = sorted(float(row["mse_levels2"]) for row in csv.DictReader(file) if row["network"] == "plain")
    assert found
    assert {cells[0] for cells in found} == {"plain", "plain+guard"}
    assert all(reached[0] <= float(cells[1]) <= reached[-1] for cells in found)
    for twin, own in zip(found[::2], found[1::2], strict=True):
        assert twin[1] == own[1]
        assert twin[3] == ""
        shown = [float(cells[2].split(" %")[0]) for cells in (twin, own)]
        assert float(own[3]) == pytest.approx(shown[1] / shown[0], abs=0.02)


def test_seeds_are_told_apart(script: Any) -> None:
    over_seeds = script("contestants").over_seeds
    assert [over_seeds([12.04]), over_seeds([10.0, 20.0]), over_seeds([float("nan")])] == ["12.0 %", "15.0 % (10.0 to 20.0)", "-"]


# ---- ablations.py ----


def test_every_variant_changes_what_the_recipe_says(script: Any) -> None:
    ablations = script("ablations")
    recipe = load_recipes([ablations.RECIPE]).settings
    changes = []
    for variant, flags in ablations.VARIANTS.items():
        for flag, value in zip(flags[::2], flags[1::2], strict=True):
            node: Any = recipe
            for part in flag.removeprefix("--").split("."):
                node = node.get("init_args", node)[part]
            assert node != json.loads(value), f"{variant}: {flag} is {value} already"
        changes.append(flags)
    assert changes[0] == ()
    assert len(set(changes)) == len(changes)


def test_ablations_stand_beside_the_undefended_network(
    script: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ablations, asked = script("ablations"), []

    def trained(*arguments: object) -> str:
        asked.append(arguments)
        return checkpoint

    monkeypatch.setattr(ablations, "trained", trained)
    run = [
        "--out",
        str(tmp_path / "out"),
        "--images",
        "4",
        "--steps",
        "1",
        "--attacks",
        "gradmdm",
        "--variants",
        "all",
        "no gap",
        "--seeds",
        "0",
        "1",
    ]
    ablations.main([*run, "--epochs", "3"])
    assert asked == [
        (ablations.RECIPE, seed, Path(f"runs/ablation-{name}-seed{seed}"), *flags, "--trainer.max_epochs", "3")
        for seed in (0, 1)
        for name, flags in (("all", ()), ("no-gap", ("--model.objective.gap", "0")))
    ]
    page = (tmp_path / "out" / "ABLATIONS.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith(("| skipnet", "| all", "| no-gap"))]
    assert [row[:2] for row in rows] == [["skipnet-20-digits", "1"], ["all", "2"], ["no-gap", "2"]]
    # Both variants are the same weights here.
    assert rows[1][2:] == rows[2][2:]
    assert rows[0][2:] != rows[1][2:]
    # Without a seed nothing is trained, and the page comes from the records.
    (tmp_path / "out" / "ABLATIONS.md").unlink()
    ablations.main(run[:-2])
    assert (len(asked), (tmp_path / "out" / "ABLATIONS.md").read_text()) == (4, page)


# ---- frontier.py ----


def test_what_a_guard_certifies_is_measured_once_and_drawn(script: Any, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frontier, out = script("frontier"), tmp_path / "out"
    asked = ["--data", "digits", "--checkpoints", checkpoint, "--images", "8", "--out", str(out), "--budgets"]
    frontier.main([*asked, "0.01", "0.6", "0.9"])
    (found,) = [json.loads(path.read_text()) for path in out.glob("*.json")]
    # A budget below what always runs has no point.
    kinds = ["as they come", "paced", "reserving", "static"]
    assert [(point["budget"], point["kind"]) for point in found["points"]] == [(None, "no guard"), *product([0.6, 0.9], kinds)]
    network = load(checkpoint)
    images = torch.zeros(1, 3, 32, 32)
    dense = price(network, images).dense
    for point in found["points"][1:]:
        assert point["flops"] <= point["most"] <= point["budget"]
        if point["kind"] in ("as they come", "paced"):
            guarded = BudgetGuard(network, point["budget"], pace=float(point["kind"] == "paced"))
            with forced(guarded, {name: torch.ones(1, 1) for name in price(network, images).units}), torch.no_grad():
                open_wide = price(guarded, images)(guarded(images, "skipped").gates).item()
            assert open_wide <= point["most"] * dense * (1 + 1e-12) <= guarded.certificate
        if point["kind"] == "static":
            assert (point["flops_sd"], point["routes"], point["flops"]) == (0, 1, point["most"])
    page = (out / "FRONTIER.md").read_text()
    last = found["points"][-2]
    assert f"| {100 * last['most']:.1f} % | {100 * (last['most'] - last['flops']) / (1 - last['flops']):.1f} % |" in page
    assert (out / "frontier.png").stat().st_size > 1000

    def measured_again(*arguments: object) -> None:
        raise AssertionError("what is there was measured again")

    monkeypatch.setattr(frontier, "points_of", measured_again)
    frontier.main([*asked, "0.01", "0.6", "0.9"])
    assert (out / "FRONTIER.md").read_text() == page
    with pytest.raises(SystemExit, match="frontier-plain.json is of another budgets; remove it"):
        frontier.main([*asked, "0.5"])
