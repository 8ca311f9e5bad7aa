"""Training checkpoints and metrics: sealed, whole, and taken up where they were left."""

from __future__ import annotations

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.training import QUIET, digits, skipnet, trainer

from gatewatt.callbacks.saving import AtomicCheckpointIO, LastCheckpoint, MetricsFile
from gatewatt.cli.trainer import with_atomic_checkpoints
from gatewatt.files import WriteFailed
from gatewatt.tasks import DynamicTraining, Optimization

pytestmark = QUIET

STATE = {"state_dict": {"weight": torch.arange(1000.0)}, "global_step": 3, "name": "x"}
STEADY = Optimization(lr=0.02, schedule="constant")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "x.ckpt")
    return tmp_path / "x.ckpt"


def test_what_is_written_is_read_back(saved: Path) -> None:
    read = AtomicCheckpointIO().load_checkpoint(saved)
    assert torch.equal(read["state_dict"]["weight"], STATE["state_dict"]["weight"])  # type: ignore[index]
    assert (read["global_step"], read["name"]) == (3, "x")
    assert list(saved.parent.iterdir()) == [saved]


def test_other_readers_read_it_too(saved: Path) -> None:
    assert torch.load(saved, weights_only=True)["global_step"] == 3
    with zipfile.ZipFile(saved) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"gatewatt sha256 ")


def test_equal_states_give_equal_files(saved: Path, tmp_path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "below" / "x.ckpt")
    assert (tmp_path / "below" / "x.ckpt").read_bytes() == saved.read_bytes()


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    sound = saved.read_bytes()
    for place in [*range(0, len(sound), 53), *range(len(sound) - 110, len(sound))]:
        spoilt = bytearray(sound)
        spoilt[place] ^= 1 << (place % 8)
        saved.write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"x\.ckpt is") as refused:
            AtomicCheckpointIO().load_checkpoint(saved)
        assert "\n" not in str(refused.value)


def test_a_file_cut_anywhere_is_noticed(saved: Path) -> None:
    sound = saved.read_bytes()
    for length in [*range(0, len(sound), 97), *range(len(sound) - 110, len(sound))]:
        saved.write_bytes(sound[:length])
        with pytest.raises(ValueError, match=r"x\.ckpt is"):
            AtomicCheckpointIO().load_checkpoint(saved)
    saved.write_bytes(sound + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(saved)


def test_a_checkpoint_of_lightning_itself_is_read_and_its_flipped_bytes_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    torch.save(STATE, path)
    assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 3
    sound = path.read_bytes()
    data = sound.index(torch.arange(1000.0).numpy().tobytes())
    for place in (data, data + 100, data + 3999):
        spoilt = bytearray(sound)
        spoilt[place] ^= 1
        path.write_bytes(spoilt)
        assert torch.load(path, weights_only=True)["global_step"] == 3, "torch notices by itself now"
        with pytest.raises(ValueError, match="damaged"):
            AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("content", [{"weights": 1}, [1, 2], {"state_dict": 3}])
def test_what_is_no_training_checkpoint_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=r"x\.ckpt is no training checkpoint: it holds no state_dict"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_full_disk_leaves_the_old_checkpoint(after: int, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    class Full:
        """A stream whose disk is full after a few writes."""

        def __init__(self, stream: Any) -> None:
            self.stream, self.writes = stream, 0

        def write(self, data: Any) -> int:
            self.writes += 1
            if self.writes > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.stream.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    from gatewatt.callbacks import saving

    true = saving._Sink
    monkeypatch.setattr(saving, "_Sink", lambda stream: true(Full(stream)))  # type: ignore[arg-type]
    with pytest.raises(WriteFailed, match=r"cannot write .*x\.ckpt: No space left on device; the file of that name is as it was"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_file_in_the_way_of_the_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(WriteFailed, match=r"cannot write .*x\.ckpt"):
        AtomicCheckpointIO().save_checkpoint(STATE, tmp_path / "checkpoints" / "x.ckpt")


# ---- plugins ----


def test_plugins_never_cost_the_writer_of_checkpoints() -> None:
    from lightning.fabric.plugins import TorchCheckpointIO
    from lightning.pytorch.plugins import MixedPrecision
    from lightning.pytorch.plugins.environments import LightningEnvironment

    for given in (None, [], LightningEnvironment(), [LightningEnvironment(), MixedPrecision("bf16-mixed", "cpu")]):
        plugins = with_atomic_checkpoints(given)
        assert [type(plugin) for plugin in plugins].count(AtomicCheckpointIO) == 1
        assert isinstance(L.Trainer(accelerator="cpu", logger=False, plugins=plugins).strategy.checkpoint_io, AtomicCheckpointIO)
    own = AtomicCheckpointIO()
    assert with_atomic_checkpoints([own]) == [own]
    with pytest.raises(ValueError, match="TorchCheckpointIO writes checkpoints its own way"):
        with_atomic_checkpoints(TorchCheckpointIO())


# ---- the last checkpoint, and the metrics ----


def fit(folder: Path, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
    run = trainer(folder, **{"max_epochs": 2, "limit_train_batches": 4, "log_every_n_steps": 1, "callbacks": list(callbacks), **settings})
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits())
    return run


def go_on(folder: Path) -> L.Trainer:
    """Resume from the last checkpoint in a folder."""
    watchers = [MetricsFile(), LastCheckpoint()]
    run = trainer(folder, max_epochs=2, limit_train_batches=4, log_every_n_steps=1, callbacks=watchers, enable_checkpointing=True)
    last = folder / "checkpoints" / "last.ckpt"
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits(), ckpt_path=last, weights_only=True)
    return run


def test_the_last_checkpoint_is_written_every_few_steps_and_after_each_epochs_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[int, bool]] = []

    def note(self: LastCheckpoint, trainer: L.Trainer) -> None:
        self.saved = trainer.global_step
        steps.append((self.saved, "val/accuracy" in trainer.callback_metrics))

    monkeypatch.setattr(LastCheckpoint, "_save", note)
    # The last batch of an epoch is left to the epoch's end.
    fit(tmp_path, LastCheckpoint(1), enable_checkpointing=True)
    assert steps == [(1, False), (2, False), (3, False), (4, True), (5, True), (6, True), (7, True), (8, True)]
    steps.clear()
    fit(tmp_path, LastCheckpoint(), enable_checkpointing=True)
    assert steps == [(4, True), (8, True)]
    steps.clear()
    fit(tmp_path, LastCheckpoint(1), enable_checkpointing=True, val_check_interval=2)
    assert [step for step, _ in steps] == [1, 3, 4, 5, 7, 8]
    with pytest.raises(ValueError, match="every must be at least 1"):
        LastCheckpoint(0)


def test_metrics_hold_every_step_and_validation(tmp_path: Path) -> None:
    run = fit(tmp_path, MetricsFile())
    import csv
    import json

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    assert [row["epoch"] for row in rows] == [0] * 5 + [1] * 5
    assert ["val/accuracy" in row for row in rows] == [index in (4, 9) for index in range(10)]
    assert ["train/cross_entropy" in row for row in rows] == [index not in (4, 9) for index in range(10)]
    assert rows[-1]["val/flops_clean"] == float(run.callback_metrics["val/flops_clean"])
    with (tmp_path / "metrics.csv").open(newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [{name: float(cell) for name, cell in row.items() if cell} for row in table] == rows
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["verb"], result["steps"]) == ("fit", 8)
    assert result["figures"]["val/accuracy"] == rows[-1]["val/accuracy"]


def test_what_the_checkpoint_does_not_vouch_for_is_cut_off(tmp_path: Path) -> None:
    fit(tmp_path, MetricsFile(), LastCheckpoint(), enable_checkpointing=True, max_epochs=1)
    path = tmp_path / "metrics.jsonl"
    sound = path.read_text()
    path.write_text(sound + '{"epoch": 1, "step": 5, "train/cross_entropy": 9.0}\n{"epoch": 1, "st')
    run = trainer(
        tmp_path, max_epochs=2, limit_train_batches=4, log_every_n_steps=1, callbacks=[MetricsFile(), LastCheckpoint()], enable_checkpointing=True
    )
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    lines = path.read_text().splitlines()
    assert lines[:5] == sound.splitlines()
    assert len(lines) == 10
    assert "9.0" not in path.read_text()


def test_metrics_that_someone_changed_are_set_aside(tmp_path: Path) -> None:
    fit(tmp_path, MetricsFile(), LastCheckpoint(), enable_checkpointing=True, max_epochs=1)
    path = tmp_path / "metrics.jsonl"
    path.write_text("mine\n" + path.read_text())
    run = trainer(
        tmp_path, max_epochs=2, limit_train_batches=4, log_every_n_steps=1, callbacks=[MetricsFile(), LastCheckpoint()], enable_checkpointing=True
    )
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert (tmp_path / "metrics-1.jsonl").read_text().startswith("mine\n")
    assert len(path.read_text().splitlines()) == 5


def test_the_latest_figures_are_there_when_nothing_is_left_to_train(tmp_path: Path) -> None:
    first = fit(tmp_path, MetricsFile(), LastCheckpoint(), enable_checkpointing=True)
    expected = {name: float(value) for name, value in first.callback_metrics.items() if name.startswith("val/")}
    again = go_on(tmp_path)
    assert {name: float(value) for name, value in again.callback_metrics.items() if name.startswith("val/")} == expected
