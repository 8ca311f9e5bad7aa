"""A run that is taken up again ends as if it had never stopped, and never goes on from what is not its own."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.cli.recipes import BASE

from gatewatt.callbacks.saving import AtomicCheckpointIO
from gatewatt.cli import main, trainer
from gatewatt.cli.resume import last_checkpoint
from gatewatt.recipes import load_recipes

RESUMABLE = BASE.replace("  max_steps: 1\n", "  max_epochs: 2\n  limit_train_batches: 3\n").replace(
    "val_images: 20", "val_images: 20\n    val_subset: 10"
)
RESUMABLE += """\
  callbacks:
    - class_path: gatewatt.callbacks.saving.LastCheckpoint
      init_args: {every: 1}
"""
FIT = ["fit", "-c", "small.yaml"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GATEWATT_TRACEBACK", raising=False)
    (tmp_path / "small.yaml").write_text(RESUMABLE)
    before = signal.getsignal(signal.SIGINT)
    # Tests may run in the background, where Ctrl+C is ignored and stays so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    # Lightning ignores further interrupts while it shuts down.
    signal.signal(signal.SIGINT, before)


class Killed(BaseException):
    """Ends a run where it stands, with no chance to save anything."""


def at_step(step: int, action: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Do something at the beginning of a step."""

    def act(self: object, trainer: L.Trainer, module: object, batch: object, index: int) -> None:
        if trainer.global_step == step:
            action()

    patch.setattr(trainer.RunFolder, "on_train_batch_start", act, raising=False)


def kill() -> None:
    raise Killed


def killed_at(step: int, name: str, patch: pytest.MonkeyPatch, *flags: str) -> None:
    with patch.context() as patched:
        at_step(step, kill, patched)
        with pytest.raises(Killed):
            main([*FIT, "--run", name, "--resume", "auto", *flags])


def ended(folder: str) -> dict[str, Any]:
    """Everything that a run leaves which must not depend on how often it was interrupted."""
    path = Path("runs") / folder
    files = {name: (path / name).read_text() for name in ("metrics.jsonl", "metrics.csv", "result.json")}
    state = AtomicCheckpointIO().load_checkpoint(path / "checkpoints" / "last.ckpt")["state_dict"]
    return {**files, "weights": {name: tensor.numpy().tobytes() for name, tensor in state.items()}}


@pytest.mark.parametrize("step", [0, 1, 3, 4, 5])
def test_the_same_command_starts_a_run_and_takes_it_up(step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--run", "whole"]) == 0
    killed_at(step, "killed", monkeypatch)
    assert "runs/killed holds no checkpoint to resume from; starting from the beginning" in capsys.readouterr().err
    assert not Path("runs/killed/result.json").exists()
    assert main([*FIT, "--run", "killed", "--resume", "auto"]) == 0
    said = capsys.readouterr().err
    if step == 0:
        assert "holds no checkpoint to resume from" in said
    else:
        assert f"gatewatt: resuming runs/killed after step {step}, from runs/killed/checkpoints/last.ckpt\n" in said
    assert ended("killed") == ended("whole")
    assert [path.name for path in Path("runs").iterdir() if "killed" in path.name] == ["killed"]


def test_a_run_that_is_killed_again_and_again_ends_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([*FIT, "--run", "whole"]) == 0
    for step in (1, 2, 3, 5):
        killed_at(step, "killed", monkeypatch)
    assert main([*FIT, "--run", "killed", "--resume", "auto"]) == 0
    assert ended("killed") == ended("whole")


@pytest.mark.parametrize("step", [1, 4])
def test_averaged_weights_and_mixed_batches_are_taken_up_too(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    averaged = RESUMABLE + "    - class_path: gatewatt.callbacks.WeightAverage\n      init_args: {decay: 0.8}\n"
    Path("small.yaml").write_text(averaged.replace("    objective:\n", "    mixing: {mixup: 0.4}\n    objective:\n"))
    assert main([*FIT, "--run", "whole"]) == 0
    killed_at(step, "killed", monkeypatch)
    assert main([*FIT, "--run", "killed", "--resume", "auto"]) == 0
    assert ended("killed") == ended("whole")


def test_a_run_killed_before_its_results_were_written_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is left to train, so no batch comes that the network could be priced on; every callback must live with that.
    reporting = """\
    - class_path: gatewatt.callbacks.GateReport
    - class_path: gatewatt.callbacks.RecoveryCallback
      init_args:
        images: 4
        attack: {class_path: gatewatt.attacks.GradMDM, init_args: {steps: 1}}
    - class_path: gatewatt.callbacks.ExportCheckpoint
      init_args: {name: small}
"""
    Path("small.yaml").write_text(RESUMABLE + reporting)
    assert main([*FIT, "--run", "whole"]) == 0
    with monkeypatch.context() as patched:
        patched.setattr(L.Callback, "on_fit_end", lambda *_: kill())
        with pytest.raises(Killed):
            main([*FIT, "--run", "killed", "--resume", "auto"])
    assert not Path("runs/killed/result.json").exists()
    assert main([*FIT, "--run", "killed", "--resume", "auto"]) == 0
    assert ended("killed") == ended("whole")
    assert Path("runs/killed/small.safetensors").read_bytes() == Path("runs/whole/small.safetensors").read_bytes()


def test_a_complete_run_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--run", "a", "--resume", "auto"]) == 0
    before = {path: path.stat().st_mtime_ns for path in Path("runs/a").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*FIT, "--run", "a", "--resume", "auto"]) == 0
    assert capsys.readouterr().err == "gatewatt: runs/a is complete (6 steps); nothing is left to do\n"
    assert {path: path.stat().st_mtime_ns for path in Path("runs/a").rglob("*") if path.is_file()} == before


def test_a_complete_run_goes_on_when_it_is_to_be_longer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--run", "a", "--resume", "auto"]) == 0
    assert main([*FIT, "--run", "a", "--resume", "auto", "--trainer.max_epochs", "3"]) == 0
    assert "going on with other settings than before: trainer.max_epochs 3 (was 2)" in capsys.readouterr().err
    assert json.loads(Path("runs/a/result.json").read_text())["steps"] == 9


def test_the_resolved_recipe_of_a_resumed_run_repeats_it_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at(4, "a", monkeypatch)
    assert main([*FIT, "--run", "a", "--resume", "auto"]) == 0
    settings = load_recipes(["runs/a/recipe.yaml"]).settings
    assert settings.get("ckpt_path") is None
    assert "resume" not in settings
    assert settings["run"] == "a"


def test_resume_may_stand_in_the_recipe_and_means_nothing_to_other_verbs(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(f"resume: auto\n{RESUMABLE}")
    assert main([*FIT, "--run", "a"]) == 0
    assert main(["validate", "-c", "small.yaml", "--run", "a"]) == 0
    assert Path("runs/a-2/metrics.csv").exists()


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gatewatt: error")]
    return line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.network.width", "5"], "--resume: runs/a holds a run of another task or network; choose another --run"),
        (["--model", "gatewatt.tasks.EnergyAdversarialTraining"], "holds a run of another task or network"),
        (["--model.optimization.lr", "0.5"], "model.optimization.lr is 0.5 here and 0.01 in runs/a"),
        (["--ckpt_path", "small.yaml"], "give one of the two"),
    ],
)
def test_what_is_not_the_same_run_is_refused(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_at(4, "a", monkeypatch)
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    assert message in one_line([*FIT, "--run", "a", "--resume", "auto", *flags], capsys)
    assert {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/diary.txt").write_text("precious")
    assert "runs/a is no run of gatewatt" in one_line([*FIT, "--run", "a", "--resume", "auto"], capsys)


def test_a_damaged_checkpoint_is_passed_over(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--run", "whole"]) == 0
    killed_at(2, "a", monkeypatch)
    Path("runs/a/checkpoints/last.ckpt").rename("runs/a/older.ckpt")
    killed_at(4, "a", monkeypatch)
    last = Path("runs/a/checkpoints/last.ckpt")
    spoilt = bytearray(last.read_bytes())
    spoilt[len(spoilt) // 2] ^= 4
    last.write_bytes(spoilt)
    (last.parent / "cut.ckpt").write_bytes(spoilt[:1000])
    capsys.readouterr()
    assert main([*FIT, "--run", "a", "--resume", "auto"]) == 0
    said = capsys.readouterr().err
    assert "gatewatt: runs/a/checkpoints/cut.ckpt cannot be read and is passed over\n" in said
    assert "gatewatt: runs/a/checkpoints/last.ckpt is damaged: its content is not what was written; it is passed over\n" in said
    assert "gatewatt: resuming runs/a after step 2, from runs/a/older.ckpt\n" in said
    assert ended("a") == ended("whole")


def test_the_checkpoint_after_the_validation_comes_before_the_one_without(tmp_path: Path) -> None:
    def write(name: str, step: int, ended: int) -> None:
        progress = {"fit_loop": {"epoch_progress": {"total": {"processed": ended}}}}
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "global_step": step, "loops": progress}, tmp_path / name)

    write("after.ckpt", 6, 2)
    write("before.ckpt", 6, 1)
    write("early.ckpt", 3, 1)
    found = last_checkpoint(tmp_path)
    assert found is not None
    assert (found.path.name, found.step) == ("after.ckpt", 6)
    assert last_checkpoint(tmp_path / "nowhere") is None


# ---- a checkpoint that is named ----


@pytest.fixture
def checkpoint() -> str:
    assert main([*FIT, "--run", "a", "--trainer.max_epochs", "1"]) == 0
    return "runs/a/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.network.width", "5"], "is of another network: SkipNet(depth=8"),
        (["--model.network.gate", "feedforward1"], "is of another network"),
        (
            ["--model.optimization.lr", "0.111"],
            "model.optimization.lr is 0.111 here and 0.01 in runs/a/checkpoints/last.ckpt, which restores its optimiser",
        ),
        (["--model.optimization.momentum", "0.5"], "give --model.optimization.momentum 0.9, or start a new run from the weights"),
        (["--model", "gatewatt.tasks.EnergyAdversarialTraining"], "is not of this task and network: it lacks: parent."),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(flags: list[str], message: str, checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in one_line([*FIT, "--run", "b", "--ckpt_path", checkpoint, *flags], capsys)
    assert not Path("runs/b").exists()


def test_a_flag_beats_what_the_checkpoint_was_trained_with(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model.objective.target", "0.4", "--trainer.max_epochs", "2"]
    assert main([*FIT, "--run", "b", "--ckpt_path", checkpoint, *flags]) == 0
    settings = load_recipes(["runs/b/recipe.yaml"]).settings
    assert settings["model"]["init_args"]["objective"]["init_args"]["target"] == 0.4
    assert "going on with other settings than before: model.objective.target 0.4 (was 0.7), trainer.max_epochs 2 (was 1)" in capsys.readouterr().err


def test_a_schedule_is_not_stretched_beyond_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    cyclic = ["--model.optimization.schedule", "one_cycle"]
    assert main([*FIT, *cyclic, "--run", "a", "--trainer.max_epochs", "1"]) == 0
    line = one_line([*FIT, *cyclic, "--run", "b", "--ckpt_path", "runs/a/checkpoints/last.ckpt"], capsys)
    assert "the learning-rate schedule of the checkpoint ends after 3 steps, this run has 6" in line


def test_a_checkpoint_of_lightning_itself_fits_by_its_tensors(checkpoint: str) -> None:
    content = torch.load(checkpoint, weights_only=True)
    del content["gatewatt"]
    torch.save(content, "plain.ckpt")
    assert main([*FIT, "--run", "b", "--ckpt_path", "plain.ckpt"]) == 0


def test_another_number_of_processes_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    kept: dict[str, Any] = {}
    watcher, module = trainer.RunFolder(Path("runs/small"), "seed_everything: 0"), L.LightningModule()

    def on(processes: int) -> Any:
        return SimpleNamespace(world_size=processes, is_global_zero=True, state=SimpleNamespace(fn="fit"))

    watcher.on_save_checkpoint(on(4), module, kept)
    watcher.on_load_checkpoint(on(4), module, kept)
    watcher.on_load_checkpoint(on(1), module, {})
    assert capsys.readouterr().err == ""
    watcher.on_load_checkpoint(on(1), module, kept)
    assert capsys.readouterr().err.startswith("gatewatt: going on with 1 instead of 4 processes: ")


# ---- being asked to stop ----


@pytest.mark.parametrize("step", [2, 5])
def test_a_run_stopped_at_the_end_of_an_epoch_still_validates(step: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FIT, "--run", "whole"]) == 0
    with monkeypatch.context() as patched:
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGTERM), patched)
        assert main([*FIT, "--run", "stopped", "--resume", "auto"]) == 143
    assert f"gatewatt: saved step {step + 1}; resume with: gatewatt fit -c small.yaml --run stopped --resume auto\n" in capsys.readouterr().err
    assert '"val/accuracy"' in Path("runs/stopped/metrics.jsonl").read_text().splitlines()[-1]
    assert main([*FIT, "--run", "stopped", "--resume", "auto"]) == 0
    assert ended("stopped") == ended("whole")


def test_the_command_that_resumes_is_printed_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as patched:
        at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM), patched)
        assert main([*FIT, "--run", "a b"]) == 143
    expected = "gatewatt fit -c small.yaml --run 'a b' --ckpt_path 'runs/a b/interrupted.ckpt'"
    assert f"gatewatt: saved step 2; resume with: {expected}\n" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_evaluation_stops_when_it_is_asked_to(number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from gatewatt.tasks import DynamicTraining

    batches = []

    def step(self: object, batch: Any, index: int) -> None:
        batches.append(index)
        if index == 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(DynamicTraining, "test_step", step)
    assert main(["test", "-c", "small.yaml", "--run", "t", "--data.test_images", "40", "--data.eval_batch_size", "10"]) == code
    assert batches == [0, 1]


def test_signals_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert main([*FIT, "--run", "a"]) == 0
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
