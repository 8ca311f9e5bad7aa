"""What a run leaves behind, and what it leaves alone."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.cli.recipes import BASE

from gatewatt.cli import main, trainer
from gatewatt.cli.folder import reserve_folder
from gatewatt.defenses import BudgetGuard, described
from gatewatt.networks.checkpoint import load, save
from gatewatt.recipes import load_recipes


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "first.yaml").write_text(BASE)
    before = signal.getsignal(signal.SIGINT)
    # Tests may run in the background, where Ctrl+C is ignored and stays so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_has_its_own_folder_and_a_second_one_leaves_it_alone(tmp_path: Path) -> None:
    assert main(["fit", "-c", "first.yaml"]) == 0
    first = contents(tmp_path / "runs" / "first")
    assert {"recipe.yaml", "metrics.csv"} <= first.keys()
    assert any(name.startswith("tensorboard/events") for name in first)
    assert any(name.startswith("checkpoints/") and name.endswith(".ckpt") for name in first)
    assert main(["fit", "-c", "first.yaml"]) == 0
    assert contents(tmp_path / "runs" / "first") == first
    second = contents(tmp_path / "runs" / "first-2")
    assert {"recipe.yaml", "metrics.csv"} <= second.keys()


def test_the_resolved_recipe_repeats_the_run(tmp_path: Path) -> None:
    assert main(["fit", "-c", "first.yaml", "--run", "a", "--model.optimization.lr", "0.003", "--trainer.max_steps", "2"]) == 0
    resolved = load_recipes([tmp_path / "runs" / "a" / "recipe.yaml"]).settings
    assert resolved["model"]["init_args"]["optimization"]["init_args"]["lr"] == 0.003
    assert resolved["trainer"]["max_steps"] == 2
    assert resolved["model"]["init_args"]["network"]["init_args"]["gate"] == "recurrent"
    assert resolved["seed_everything"] == 0
    assert main(["fit", "-c", "runs/a/recipe.yaml"]) == 0
    again = load_recipes([tmp_path / "runs" / "a-2" / "recipe.yaml"]).settings
    assert again == resolved
    first, second = ((tmp_path / "runs" / name / "metrics.csv").read_text() for name in ("a", "a-2"))
    assert "train/cross_entropy" in first
    assert first == second


def test_flags_win_over_recipes_and_later_recipes_over_earlier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "second.yaml").write_text("trainer: {max_steps: 5, min_steps: 4}")
    assert main(["fit", "-c", "first.yaml", "-c", "second.yaml", "--trainer.max_steps", "7", "--print_config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    printed = load_recipes(["printed.yaml"]).settings
    assert (printed["trainer"]["max_steps"], printed["trainer"]["min_steps"]) == (7, 4)
    assert not (tmp_path / "runs").exists()


def test_the_name_of_a_run(tmp_path: Path) -> None:
    assert reserve_folder("x") == Path("runs/x")
    assert reserve_folder("x") == Path("runs/x-2")
    assert reserve_folder("x") == Path("runs/x-3")
    assert reserve_folder("elsewhere/y") == Path("elsewhere/y")
    assert reserve_folder(str(tmp_path / "z")) == tmp_path / "z"


def test_a_file_in_the_way_is_not_overwritten() -> None:
    Path("runs").mkdir()
    Path("runs/x").write_text("precious")
    assert reserve_folder("x") == Path("runs/x-2")
    assert Path("runs/x").read_text() == "precious"


def test_nothing_is_taken_from_a_checkpoint_but_its_state(tmp_path: Path) -> None:
    assert main(["fit", "-c", "first.yaml", "--run", "a"]) == 0
    checkpoint = next((tmp_path / "runs" / "a" / "checkpoints").glob("*.ckpt"))
    assert main(["fit", "-c", "first.yaml", "--run", "b", "--ckpt_path", str(checkpoint), "--trainer.max_steps", "2"]) == 0
    assert load_recipes(["runs/b/recipe.yaml"]).settings["trainer"]["max_steps"] == 2
    assert any("step=2" in path.name for path in (tmp_path / "runs" / "b" / "checkpoints").glob("*.ckpt"))


def test_an_interrupted_run_says_so_by_its_exit_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(self: object, *arguments: object) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(trainer.RunFolder, "on_train_batch_start", interrupt)
    try:
        assert main(["fit", "-c", "first.yaml"]) == 130
    finally:
        # Lightning ignores further interrupts while it shuts down.
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.endswith("gatewatt: interrupted\n")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = (folder / "checkpoints").glob("*.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_resumes_to_the_very_weights_of_one_that_was_not(
    number: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--trainer.max_steps", "8", "--data.batch_size", "300"]  # three steps per epoch
    assert main(["fit", "-c", "first.yaml", "--run", "whole", *steps]) == 0

    def stop(self: object, trainer: L.Trainer, module: object, batch: object, index: int) -> None:
        if trainer.global_step == 4:
            signal.raise_signal(number)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.RunFolder, "on_train_batch_start", stop)
        try:
            assert main(["fit", "-c", "first.yaml", "--run", "stopped", *steps]) == code
        finally:
            # Lightning ignores further interrupts while it shuts down.
            signal.signal(signal.SIGINT, before)
    checkpoint = tmp_path / "runs" / "stopped" / "interrupted.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 5
    assert "--ckpt_path runs/stopped/interrupted.ckpt" in capsys.readouterr().err
    assert main(["fit", "-c", "first.yaml", "--run", "resumed", "--ckpt_path", str(checkpoint), *steps]) == 0
    whole, resumed = weights(tmp_path / "runs" / "whole"), weights(tmp_path / "runs" / "resumed")
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_an_error_during_the_run_does_not_blame_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(self: object, *arguments: object) -> None:
        raise ValueError("the depth of despair")

    monkeypatch.setattr(trainer.RunFolder, "on_train_batch_start", fail)
    assert main(["fit", "-c", "first.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "gatewatt: error: the depth of despair"


def test_validation_and_test_stand_alone(tmp_path: Path) -> None:
    assert main(["validate", "-c", "first.yaml", "--run", "v"]) == 0
    assert main(["test", "-c", "first.yaml", "--run", "t", "--data.test_images", "20"]) == 0
    assert (tmp_path / "runs" / "t" / "recipe.yaml").is_file()


def test_a_test_says_if_it_leaves_out_what_the_weights_were_trained_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded = BudgetGuard(load("skipnet-20-digits"), 0.6)
    save(guarded.network, tmp_path / "guarded.safetensors", card={"defense": described(guarded)})
    asked = ["test", "-c", "task/train", "-c", "network/skipnet-20-small", "-c", "data/digits", "--data.test_images", "4", "--model.checkpoint"]
    assert main([*asked, "guarded.safetensors"]) == 0
    certificate = described(guarded)["certificate"]  # type: ignore[index]
    behind = f"BudgetGuard budget=0.6 certificate={certificate} pace=0.0"
    line = f"gatewatt: guarded.safetensors was trained behind {behind}, and this run measures it without: add -c defense/..."
    assert line in capsys.readouterr().err.splitlines()
    assert main([*asked, "guarded.safetensors", "-c", "defense/guard", "--model.defense.budget", "0.6"]) == 0
    assert main([*asked, "skipnet-20-digits"]) == 0
    assert "trained behind" not in capsys.readouterr().err
