"""Whatever is wrong with a recipe comes out as one line that names the file, the line and the key, with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cli.recipes import BASE, with_line

from gatewatt.cli import main

NETWORK, OBJECTIVE, OPTIMIZATION = (f"model.init_args.{part}" for part in ("network", "objective", "optimization"))

# What is replaced in the recipe, by what; the key that the error names; a part of the message.
MISTAKES = {
    "unknown group": ("trainer:", "trainr:", "trainr", "did you mean trainer?"),
    "unknown field of the trainer": ("max_steps:", "max_stepz:", "trainer.max_stepz", "did you mean max_steps?"),
    "unknown field of the task": ("objective:", "objectiv:", "model.init_args.objectiv", "did you mean objective?"),
    "unknown field of the network": ("depth:", "depht:", f"{NETWORK}.init_args.depht", "SkipNet has no field 'depht'; did you mean depth?"),
    "unknown field of the objective": ("target:", "targte:", f"{OBJECTIVE}.init_args.targte", "did you mean target?"),
    "unknown field of the data": ("val_images:", "images:", "data.init_args.images", "DigitsData has no field 'images'"),
    "unknown empty group": ("max_steps: 1", "max_stepz: {}", "trainer.max_stepz", "no such field"),
    "unknown task": ("DynamicTraining", "DynamicTrainin", "model.class_path", "there is no class gatewatt.tasks.DynamicTrainin"),
    "unknown network": ("SkipNet", "SkipNett", f"{NETWORK}.class_path", "there is no class gatewatt.networks.SkipNett"),
    "unknown data": ("DigitsData", "DigitData", "data.class_path", "there is no class gatewatt.data.DigitData"),
    "unknown module": (
        "gatewatt.objectives.C",
        "gatewat.objectives.C",
        f"{OBJECTIVE}.class_path",
        "there is no class gatewat.objectives.ComputeTarget",
    ),
    "not one of ours": ("gatewatt.objectives.ComputeTarget", "os.system", f"{OBJECTIVE}.class_path", "os.system is no Objective"),
    "another kind": ("gatewatt.networks.SkipNet", "gatewatt.networks.ResNet", f"{NETWORK}.class_path", "ResNet is no DynamicNetwork"),
    "text for a number": ("depth: 8", "depth: deep", f"{NETWORK}.init_args.depth", "must be int, got deep"),
    "fraction for a count": ("max_steps: 1", "max_steps: 1.5", "trainer.max_steps", "must be int, got 1.5"),
    "list for a number": ("lr: 1e-2", "lr: [1]", f"{OPTIMIZATION}.init_args.lr", "must be float, got [1]"),
    "null for a number": ("target: 0.7", "target: null", f"{OBJECTIVE}.init_args.target", "must not be null"),
    "choice": ("width: 4", "gate: sometimes", f"{NETWORK}.init_args.gate", "one of 'recurrent', 'feedforward1', 'feedforward2', got sometimes"),
    "number out of range": ("target: 0.7", "target: 1.7", f"{OBJECTIVE}.init_args.target", "target must be in (0, 1]"),
    "negative rate": ("lr: 1e-2", "lr: -1e-2", f"{OPTIMIZATION}.init_args.lr", "lr must be positive"),
    "impossible depth": ("depth: 8", "depth: 9", f"{NETWORK}.init_args.depth", "depth must be 6n + 2"),
    "empty batches": ("batch_size: 16", "batch_size: 0", "data.init_args.batch_size", "batch_size must be at least 1, got 0"),
    "wrong number of classes": ("num_classes: 10", "num_classes: 11", f"{NETWORK}.init_args.num_classes", "the data digits has 10 classes"),
    "no such accelerator": ("accelerator: cpu", "accelerator: abacus", "trainer.accelerator", "invalid accelerator name"),
    "no devices": ("accelerator: cpu", "devices: 0", "trainer.devices", "devices"),
    "steps below zero": ("max_steps: 1", "max_steps: -7", "trainer.max_steps", "non-negative integer or -1"),
    "unknown precision": ("accelerator: cpu", "precision: 12", "trainer.precision", "got 12"),
    "unknown callback": ("accelerator: cpu", "callbacks: [Nothing]", "trainer.callbacks", "there is no class 'Nothing'"),
    "field of a callback": (
        "accelerator: cpu",
        "callbacks: [{class_path: gatewatt.callbacks.RecoveryCallback, init_args: {image: 3}}]",
        "trainer.callbacks.0.init_args.image",
        "RecoveryCallback has no field 'image'; did you mean images?",
    ),
    "seed too large": ("trainer:", "seed_everything: 99999999999999\ntrainer:", "seed_everything", "99999999999999"),
    "root of the trainer": ("accelerator: cpu", "default_root_dir: here", "trainer.default_root_dir", "chosen with --run"),
    "missing checkpoint": ("trainer:", "ckpt_path: nowhere.ckpt\ntrainer:", "ckpt_path", "there is no file nowhere.ckpt"),
    "checkpoint on the net": ("trainer:", "ckpt_path: https://example.org/a.ckpt\ntrainer:", "ckpt_path", "address on the net"),
    "missing weights": ("    objective:", "    checkpoint: nowhere\n    objective:", "model.init_args.checkpoint", "nowhere"),
    "weights on the net": ("    objective:", "    checkpoint: http://example.org/a.safetensors\n    objective:", "model.init_args.checkpoint", "URL"),
    "duplicate key": ("width: 4", "width: 4\n        width: 5", f"{NETWORK}.init_args.width", "the key appears twice"),
    "not a number": ("lr: 1e-2", "lr: .nan", f"{OPTIMIZATION}.init_args.lr", "numbers must be finite"),
    "bad syntax": ("width: 4", "width: [4", "", "not valid YAML"),
    "file for a network": (
        "class_path: gatewatt.networks.SkipNet",
        "class_path: network.yaml",
        f"{NETWORK}.class_path",
        "there is no class network.yaml",
    ),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GATEWATT_TRACEBACK", raising=False)


@pytest.mark.parametrize(("old", "new", "key", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_recipe_is_one_line(old: str, new: str, key: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, line = with_line(old, new)
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["fit", "-c", "wrong.yaml"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("gatewatt: error: wrong.yaml:")
    assert err.count("\n") == 1
    assert message in err
    assert key in err
    if "\n" not in new and key:
        assert err.startswith(f"gatewatt: error: wrong.yaml:{line}: {key}: ")
    assert out == ""
    assert list(tmp_path.glob("runs/*")) == []


def test_the_fragment_that_set_the_key_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "deep.yaml").write_text("model:\n  init_args:\n    network:\n      init_args:\n        depth: 9\n")
    (tmp_path / "top.yaml").write_text("extends: [base.yaml, deep.yaml]\ntrainer:\n  max_steps: 2\n")
    assert main(["fit", "-c", "top.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"gatewatt: error: deep.yaml:5: {NETWORK}.init_args.depth: ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.network.depth", "deep"], f"--{NETWORK}.init_args.depth: must be int, got deep"),
        (["--model.network.depht", "8"], f"--{NETWORK}.init_args.depht: SkipNet has no field 'depht'; did you mean depth?"),
        (["--model.optimization.lr", ".nan"], f"--{OPTIMIZATION}.init_args.lr: numbers must be finite"),
        (["--model.optimization.lr", ".inf"], f"--{OPTIMIZATION}.init_args.lr: numbers must be finite"),
        (["--trainer.max_stepz", "3"], "unrecognized arguments: --trainer.max_stepz 3"),
        (["--nothing"], "unrecognized arguments: --nothing"),
        (["nothing"], "unrecognized arguments: nothing"),
        (["--data"], "argument --data: expected one argument"),
        (["-c"], "-c needs the name of a recipe"),
        (["-c", "--run"], "-c needs the name of a recipe"),
        (["-c", "nowhere.yaml"], "no recipe 'nowhere.yaml'"),
        # The recipe holds a sound value of the same key: it is the flag that is wrong.
        (["--model.network.depth", "9"], "--model.network.depth: depth must be 6n + 2"),
        (["--model.network.depth=9"], "--model.network.depth: depth must be 6n + 2"),
        (["--model.init_args.network.init_args.depth", "9"], "--model.init_args.network.init_args.depth: depth must be 6n + 2"),
        (["--model.objective.target", "1.7"], "--model.objective.target: target must be in (0, 1]"),
        (["--model.optimization.lr", "-1e-2"], "--model.optimization.lr: lr must be positive"),
        (["--model.network.num_classes", "11"], "--model.network.num_classes: num_classes of the network is 11, the data digits has 10 classes"),
        (["--data.batch_size", "0"], "--data.batch_size: batch_size must be at least 1, got 0"),
        (["--data.val_images", "-1"], "--data.val_images: val_images must be at least 0, got -1"),
        (["--trainer.max_steps", "1.5"], "--trainer.max_steps: must be int, got 1.5"),
        (["--trainer.max_steps", "-7"], "--trainer.max_steps: "),
        (["--trainer.accelerator", "abacus"], "--trainer.accelerator: "),
        (["--trainer.default_root_dir", "here"], "--trainer.default_root_dir: the run folder is chosen with --run"),
        (["--ckpt_path", "nowhere.ckpt"], "--ckpt_path: there is no file nowhere.ckpt"),
        (["--ckpt_path", "s3://bucket/a.ckpt"], "--ckpt_path: s3://bucket/a.ckpt is an address on the net"),
        (["--model.checkpoint", "https://example.org/a.safetensors"], "--model.checkpoint: "),
        (["--resume", "always"], "--resume: must be one of 'auto'"),
        (["--trainer.plugins", "lightning.pytorch.plugins.TorchCheckpointIO"], "--trainer.plugins: TorchCheckpointIO writes checkpoints its own way"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line_that_names_the_flag(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "right.yaml").write_text(BASE)
    assert main(["fit", "-c", "right.yaml", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"gatewatt: error: {message}")
    assert err.count("\n") == 1


def test_a_recipe_s_mistake_is_the_recipe_s_though_a_flag_gives_the_same_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, line = with_line("depth: 8", "depth: deep")
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["fit", "-c", "wrong.yaml", "--model.network.depth", "8"]) == 2
    assert capsys.readouterr().err.startswith(f"gatewatt: error: wrong.yaml:{line}: {NETWORK}.init_args.depth: must be int, got deep")


def test_a_recipe_s_mistake_is_not_blamed_on_a_flag_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, line = with_line("depth: 8", "depth: 9")
    (tmp_path / "wrong.yaml").write_text(text)
    assert main(["fit", "-c", "wrong.yaml", "--model.network.width", "6", "--trainer.max_steps", "2"]) == 2
    assert capsys.readouterr().err.startswith(f"gatewatt: error: wrong.yaml:{line}: {NETWORK}.init_args.depth: depth must be 6n + 2")


def test_a_recipe_without_a_task_says_what_to_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare.yaml").write_text("trainer: {max_steps: 1}")
    assert main(["fit", "-c", "bare.yaml"]) == 2
    assert capsys.readouterr().err == "gatewatt: error: bare.yaml: no task is given; add one, such as -c task/train\n"


def test_a_task_without_a_network_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare.yaml").write_text("model:\n  class_path: gatewatt.tasks.DynamicTraining\n")
    assert main(["fit", "-c", "bare.yaml"]) == 2
    assert capsys.readouterr().err == "gatewatt: error: bare.yaml:1: model: network must be given\n"


def test_the_traceback_is_there_for_those_who_ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWATT_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["fit", "-c", "nowhere.yaml"])


def test_a_fault_of_gatewatt_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(verb: str, recipe: object, flags: object) -> int:
        raise AssertionError("a bug")

    (tmp_path / "right.yaml").write_text(BASE)
    monkeypatch.setattr("gatewatt.cli.trainer.run", broken)
    with pytest.raises(AssertionError, match="a bug"):
        main(["fit", "-c", "right.yaml"])
