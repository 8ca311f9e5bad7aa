"""The moving average of the weights: the right numbers, validated, calibrated, exported and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.training import QUIET, digits, skipnet, trainer

from gatewatt.callbacks import AtomicCheckpointIO, ExitBudget, ExportCheckpoint, SaliencyCalibration, WeightAverage
from gatewatt.networks import DVT, ManiDP
from gatewatt.networks.checkpoint import load
from gatewatt.tasks import DynamicTraining, Optimization

pytestmark = [
    *QUIET,
    # Lightning says at length that it restores what the average needs.
    pytest.mark.filterwarnings("ignore:Found current_model_state"),
]

WEIGHT = "trunk.head.weight"


class Watch(L.Callback):
    """The weights after each step, and those in place when a validation begins and ends."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append(pl_module.network.get_parameter(WEIGHT).detach().clone())

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.validated.append(pl_module.network.get_parameter(WEIGHT).detach().clone())

    on_validation_epoch_end = on_validation_start


def test_the_average_is_validated_and_exported_and_the_weights_are_trained(tmp_path: Path) -> None:
    def fit(*callbacks: L.Callback) -> Watch:
        watch = Watch()
        task = DynamicTraining(skipnet(), optimization=Optimization(lr=0.05, schedule="constant"))
        trainer(tmp_path, max_epochs=2, limit_train_batches=3, callbacks=[*callbacks, watch]).fit(task, digits())
        return watch

    plain, averaged = fit(), fit(WeightAverage(0.5), ExportCheckpoint("x"))
    assert all(torch.equal(*pair) for pair in zip(plain.steps, averaged.steps, strict=True)), "training itself is another"
    average, expected = averaged.steps[0], []
    for step, weight in enumerate(averaged.steps):
        average = 0.5 * average + 0.5 * weight
        expected += [average, average] if step in (2, 5) else []
    assert len(averaged.validated) == 4
    for found, wanted in zip(averaged.validated, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(load(tmp_path / "x.safetensors").get_parameter(WEIGHT).detach(), expected[-1])


def test_a_resumed_run_ends_with_the_same_average(tmp_path: Path) -> None:
    def fit(name: str, steps: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
        task = DynamicTraining(skipnet(), optimization=Optimization(lr=0.05, schedule="constant"))
        run = trainer(tmp_path, max_epochs=-1, max_steps=steps, limit_val_batches=0, callbacks=[WeightAverage(0.7)], plugins=[AtomicCheckpointIO()])
        if steps < 4:
            save = tmp_path / f"{name}.ckpt"

            class Save(L.Callback):
                def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
                    trainer.save_checkpoint(save)

            run.callbacks.append(Save())  # type: ignore[attr-defined]
        run.fit(task, digits(), ckpt_path=resume)
        return task.network.state_dict()

    whole = fit("whole", 4)
    fit("part", 2)
    resumed = fit("resumed", 4, tmp_path / "part.ckpt")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_exits_are_calibrated_on_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    calibrate = ExitBudget.calibrate

    def watched(self: ExitBudget, trainer: L.Trainer, pl_module: Any) -> torch.Tensor:
        seen.append(pl_module.network.stages[0].head.weight.detach().clone())
        return calibrate(self, trainer, pl_module)

    monkeypatch.setattr(ExitBudget, "calibrate", watched)
    torch.manual_seed(0)
    task = DynamicTraining(DVT("small-32", 10, dim=16, depth=1, heads=2), optimization=Optimization("adamw", 1e-2, schedule="constant"))
    average = WeightAverage(0.9)
    run = trainer(tmp_path, limit_train_batches=4, callbacks=[average, ExitBudget(images=32), ExportCheckpoint("x")])
    run.fit(task, digits())
    exported = load(tmp_path / "x.safetensors")
    assert isinstance(exported, DVT)
    assert len(seen) == 1
    assert torch.equal(seen[0], exported.stages[0].head.weight)
    assert exported.confidence.tolist() == pytest.approx([run.callback_metrics[f"val/confidence{stage}"].item() for stage in (1, 2)], abs=1e-6)


def test_what_would_calibrate_other_weights_is_refused(tmp_path: Path) -> None:
    task = DynamicTraining(DVT("small-32", 10, dim=16, depth=1, heads=2))
    with pytest.raises(ValueError, match="list WeightAverage before ExitBudget"):
        trainer(tmp_path, limit_train_batches=1, callbacks=[ExitBudget(images=32), WeightAverage()]).fit(task, digits())
    task = DynamicTraining(ManiDP(8, width=4))
    for callbacks in ([SaliencyCalibration(), WeightAverage()], [WeightAverage(), SaliencyCalibration()]):
        with pytest.raises(ValueError, match="WeightAverage does not go with SaliencyCalibration"):
            trainer(tmp_path, limit_train_batches=1, callbacks=callbacks).fit(task, digits())
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\), got 1"):
        WeightAverage(1)
