"""The trained network as a file of its own."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tests.training import QUIET, digits, skipnet, trainer

from gatewatt.attacks import GradMDM
from gatewatt.callbacks import ExportCheckpoint, RecoveryCallback
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
    assert (card["dataset"], card["seed"], card["epochs"], card["recipe"]) == ("digits", 0, 2, None)
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


@pytest.mark.parametrize("name", ["", "a/b", "x.safetensors"])
def test_a_name_is_a_file_name_without_suffix(name: str) -> None:
    with pytest.raises(ValueError, match="name must be a plain file name without suffix"):
        ExportCheckpoint(name)
