"""The trained network as a file of its own."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tests.training import QUIET, batches, digits, skipnet, trainer

from gatewatt.attacks import GradMDM
from gatewatt.callbacks import ExportCheckpoint, RecoveryCallback
from gatewatt.data import DigitsData, ImageData
from gatewatt.data.loader import BatchLoader
from gatewatt.networks.checkpoint import card_of, load
from gatewatt.tasks import DynamicTraining, EnergyAdversarialTraining, Optimization

pytestmark = QUIET

STEADY = Optimization(lr=0.02, schedule="constant")


@pytest.mark.parametrize("kind", [DynamicTraining, EnergyAdversarialTraining])
def test_the_file_is_the_trained_network(kind: type[DynamicTraining], tmp_path: Path) -> None:
    task = kind(skipnet(), optimization=STEADY)
    run = trainer(tmp_path, max_epochs=2, limit_train_batches=1, callbacks=[ExportCheckpoint("skipnet-8-digits")])
    run.fit(task, digits())
    loaded, images = load(tmp_path / "skipnet-8-digits.safetensors"), torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).logits, task.network.eval()(images).logits)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, task.network.state_dict()[name])
    card = card_of(tmp_path / "skipnet-8-digits.safetensors")
    assert (card["dataset"], card["size"], card["seed"], card["epochs"], card["recipe"]) == ("digits", 32, 0, 2, None)
    assert card["validation"] == {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    assert {"val/accuracy", "val/flops_clean"} <= card["validation"].keys()
    assert card["versions"]["torch"] == version("torch")


def test_the_card_holds_the_recipe_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: {}\n")
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[ExportCheckpoint("x")])
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits())
    assert card_of(tmp_path / "x.safetensors")["recipe"] == "model: {}\n"


def test_a_figure_that_is_undefined_costs_no_training(tmp_path: Path) -> None:
    network = skipnet()
    with torch.no_grad():
        network.gating.projection.bias.fill_(20.0)  # every gate open: recovery is undefined
    callbacks = [RecoveryCallback(GradMDM(steps=1), images=4), ExportCheckpoint("x")]
    run = trainer(tmp_path, limit_train_batches=1, callbacks=callbacks)
    run.fit(DynamicTraining(network, optimization=STEADY), digits())
    validation = card_of(tmp_path / "x.safetensors")["validation"]
    assert validation["val/recovery_percent"] is None
    assert validation["val/flops_fraction"] == pytest.approx(1)


def test_the_file_is_named_after_the_data_of_the_run(tmp_path: Path) -> None:
    def fit(data: ImageData) -> None:
        callbacks = [ExportCheckpoint("skipnet-8-{dataset}-robust")]
        trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=callbacks).fit(DynamicTraining(skipnet(), optimization=STEADY), data)

    other = digits()
    other.name = "letters"
    fit(other)
    assert [path.name for path in sorted(tmp_path.glob("skipnet*"))] == ["skipnet-8-letters-robust.json", "skipnet-8-letters-robust.safetensors"]
    other.name = "a/b"
    with pytest.raises(ValueError, match=r"skipnet-8-\{dataset\}-robust names the file after its data, and .* is named 'a/b'; set data.name"):
        fit(other)


def exported(tmp_path: Path, task: DynamicTraining, data: ImageData | None = None) -> str:
    """The type in which an export that may halve stores the network of a task, which is not trained."""
    run = trainer(tmp_path, max_epochs=0, callbacks=[ExportCheckpoint("x", half=True)])
    run.fit(task, digits() if data is None else data)
    return card_of(tmp_path / "x.safetensors")["dtype"]


def test_half_is_stored_where_no_prediction_and_no_gate_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = skipnet()
    assert exported(tmp_path, DynamicTraining(network, optimization=STEADY)) == "float16"
    assert "in float16" in capsys.readouterr().out
    loaded, images = load(tmp_path / "x.safetensors"), torch.cat([batch.images for batch in batches(digits(), "val")])
    with torch.no_grad():
        own, other = network.eval()(images), loaded(images)
    assert torch.equal(own.logits.argmax(1), other.logits.argmax(1))
    assert not torch.equal(own.logits, other.logits), "rounding is to be seen at all"


def test_half_is_not_stored_where_a_gate_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = skipnet()
    with torch.no_grad():
        # Every score is on its threshold, and a little below once the bias is rounded.
        network.gating.projection.weight.zero_()
        network.gating.projection.bias.fill_(0.1)
        network.threshold.copy_(torch.sigmoid(network.gating.projection.bias)[0])
    assert exported(tmp_path, DynamicTraining(network, optimization=STEADY)) == "float32"
    assert re.search(r"stored in float32, not float16: of 12 images \d+ change their prediction and 12 a gate", capsys.readouterr().out)


def test_half_is_not_stored_where_a_weight_is_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = skipnet()
    with torch.no_grad():
        network.trunk.head.weight[0] = 1e5
    assert exported(tmp_path, DynamicTraining(network, optimization=STEADY)) == "float32"
    assert "stored in float32, not float16: trunk.head.weight holds numbers beyond its range" in capsys.readouterr().out


def test_without_images_to_compare_on_nothing_is_halved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Unvalidated(DigitsData):
        def val_dataloader(self) -> list[BatchLoader]:
            return []

    assert exported(tmp_path, DynamicTraining(skipnet(), optimization=STEADY), Unvalidated()) == "float32"
    assert "there are no validation images to compare on" in capsys.readouterr().out


def test_images_to_compare_on_are_counted() -> None:
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        ExportCheckpoint("x", images=0)


@pytest.mark.parametrize("name", ["", "a/b", "x.safetensors"])
def test_a_name_is_a_file_name_without_suffix(name: str) -> None:
    with pytest.raises(ValueError, match="name must be a plain file name without suffix"):
        ExportCheckpoint(name)
