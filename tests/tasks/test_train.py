"""Training on clean images: it learns, measures what really ran, and stops where a figure would be wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.training import QUIET, batches, digits, skipnet, statistics, trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from gatewatt.data import Mixing
from gatewatt.defenses import BitDepth, Defended, Wrapper
from gatewatt.flops import FlopsLedger, audit, price
from gatewatt.gating import DynamicNetwork, DynamicOutput
from gatewatt.networks import SkipNet
from gatewatt.networks.checkpoint import CheckpointError, save
from gatewatt.objectives import ComputeTarget, Terms
from gatewatt.tasks import DynamicTraining, EnergyAttackEvaluation, Optimization

pytestmark = QUIET


class Losses(L.Callback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def test_twenty_steps_lower_the_loss(tmp_path: Path) -> None:
    losses, network, batch = Losses(), SkipNet(8, width=16), next(iter(digits().train_dataloader()))
    with torch.no_grad():
        before = functional.cross_entropy(copy.deepcopy(network)(batch.images).logits, batch.labels).item()
    task = DynamicTraining(network, ComputeTarget(0.7), Optimization(lr=0.02, schedule="constant"))
    # The same batch again and again: nothing but the steps can change its loss.
    trainer(tmp_path, callbacks=[losses]).fit(task, *(DataLoader([batch] * count, batch_size=None) for count in (20, 1)))
    assert len(losses.values) == 20
    assert sum(losses.values[-5:]) < 0.75 * sum(losses.values[:5])
    with torch.no_grad():
        assert functional.cross_entropy(network(batch.images).logits, batch.labels).item() < 0.75 * before


def test_a_network_that_was_loaded_for_evaluation_is_trained_in_train_mode(tmp_path: Path) -> None:
    task = DynamicTraining(skipnet().eval(), optimization=Optimization(lr=0.01))
    before = statistics(task.network)
    trainer(tmp_path, max_steps=2, limit_val_batches=1).fit(task, digits())
    assert all(not torch.equal(tensor, before[name]) for name, tensor in statistics(task.network).items())


def test_the_logged_terms_add_up_to_the_loss(tmp_path: Path) -> None:
    losses = Losses()
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[losses])
    fit.fit(DynamicTraining(skipnet(), ComputeTarget(0.2), Optimization(lr=0.01)), digits())
    logged = {name: value.item() for name, value in fit.callback_metrics.items()}
    assert logged.keys() == {"train/cross_entropy", "train/compute"}
    assert sum(logged.values()) == pytest.approx(losses.values[0], rel=1e-6)


def test_the_objective_is_told_how_far_the_run_is(tmp_path: Path) -> None:
    class Told(ComputeTarget):
        def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
            told.append(self.progress)
            return super().__call__(output, labels, ledger)

    told: list[float] = []
    trainer(tmp_path, max_steps=4, limit_val_batches=0).fit(DynamicTraining(skipnet(), Told(), Optimization(lr=0.01)), digits())
    assert told == [0, 0.25, 0.5, 0.75]


def test_dense_training_runs_every_block_and_leaves_the_gates_alone(tmp_path: Path) -> None:
    network = skipnet()
    before = copy.deepcopy(network.state_dict())
    task = DynamicTraining(network, optimization=Optimization(lr=0.01, weight_decay=0), execution="dense")
    fit = trainer(tmp_path, limit_train_batches=2)
    fit.fit(task, digits())
    assert fit.callback_metrics["val/flops_fraction"].item() == 1
    moved = {name.split(".")[0] for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"trunk"}
    with pytest.raises(ValueError, match="execution must be masked or dense"):
        DynamicTraining(network, execution="skipped")  # type: ignore[arg-type]


def test_mixed_batches_are_what_the_objective_sees_and_depend_on_the_step_alone(tmp_path: Path) -> None:
    class Seen(ComputeTarget):
        def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
            seen.append(labels)
            return super().__call__(output, labels, ledger)

    weights = []
    for _ in range(2):
        seen: list[Tensor] = []
        task = DynamicTraining(skipnet(), Seen(0.7), Optimization(lr=0.01), mixing=Mixing())
        torch.rand(len(weights))  # what was drawn before the run must not matter
        trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(task, digits())
        weights.append(task.network.trunk.head.weight)
    assert torch.equal(*weights)
    assert all(labels.shape == (16, 10) and labels.sum(1).tolist() == pytest.approx([1] * 16) for labels in seen)
    assert any(bool(((labels > 0) & (labels < 1)).any()) for labels in seen)
    plain = DynamicTraining(skipnet(), ComputeTarget(0.7), Optimization(lr=0.01))
    trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(plain, digits())
    assert not torch.equal(plain.network.trunk.head.weight, weights[0])


def posterized(network: DynamicNetwork) -> Wrapper:
    """A defense that changes every image a lot."""
    return Defended(network, BitDepth(1))


@pytest.mark.parametrize(("verb", "defense"), [("validate", None), ("test", None), ("test", posterized)])
def test_accuracy_and_flops_are_those_of_an_image_by_image_count(
    verb: str, defense: Callable[[DynamicNetwork], Wrapper] | None, tmp_path: Path
) -> None:
    plain = skipnet()
    task = DynamicTraining(plain, defense=defense)
    network: DynamicNetwork = plain if defense is None else defense(plain)
    (figures,) = getattr(trainer(tmp_path), verb)(task, digits(), verbose=False)
    split = "val" if verb == "validate" else "test"
    network.eval()
    chosen = batches(digits(), split)
    images, labels = torch.cat([batch.images for batch in chosen]), torch.cat([batch.labels for batch in chosen])
    flops = [audit(network, image[None]) for image in images]
    with torch.no_grad():
        correct = sum(int(network(image[None]).logits.argmax()) == int(label) for image, label in zip(images, labels, strict=True))
    undefended = [audit(plain, image[None]) for image in images]
    assert len(set(undefended)) > 1
    assert (flops == undefended) == (defense is None)
    assert figures == {
        f"{split}/accuracy": pytest.approx(correct / 12),
        f"{split}/flops_clean": sum(flops) / 12,
        f"{split}/flops_fraction": pytest.approx(sum(flops) / 12 / price(network, images[:1]).dense),
    }


def test_weights_for_other_classes_are_refused_with_what_to_do(tmp_path: Path) -> None:
    file = str(tmp_path / "ten.safetensors")
    save(skipnet(), file, card={})
    other: list[Callable[[], object]] = [
        lambda: DynamicTraining(skipnet(num_classes=7), checkpoint=file),
        lambda: DynamicTraining(skipnet(num_classes=7), checkpoint=file, defense=posterized),
        lambda: EnergyAttackEvaluation(skipnet(), source=skipnet(num_classes=7), source_checkpoint=file),
    ]
    for make in other:
        with pytest.raises(CheckpointError) as refused:
            make()
        assert str(refused.value) == (
            f"checkpoint {file} tells 10 classes apart and the network 7, so its classifier does not fit: "
            "for data of 10 classes set num_classes to 10, for other data leave the checkpoint out"
        )
    # Anything else that differs is said by its shape.
    with pytest.raises(CheckpointError, match="does not fit SkipNet"):
        DynamicTraining(skipnet(width=5), checkpoint=file)


def test_figures_are_taken_in_float32_whatever_the_training_precision(tmp_path: Path) -> None:
    figures = [
        trainer(tmp_path, precision=precision).validate(DynamicTraining(skipnet()), digits(), verbose=False)
        for precision in ("32-true", "bf16-mixed")
    ]
    assert figures[0] == figures[1]


def test_a_second_validation_starts_from_zero(tmp_path: Path) -> None:
    task, run = DynamicTraining(skipnet()), trainer(tmp_path)
    assert run.validate(task, digits(), verbose=False) == run.validate(task, digits(), verbose=False)
    assert task.evaluation.meter.images == 12


def test_a_checkpoint_holds_the_network_and_nothing_of_the_measurement(tmp_path: Path) -> None:
    task, run = DynamicTraining(skipnet()), trainer(tmp_path, limit_train_batches=1)
    run.fit(task, digits())
    run.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert state.keys() == {f"network.{name}" for name in task.network.state_dict()}


# ---- what stops a run ----


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize(("where", "what"), [("trunk.head", "logits hold"), ("gating.projection", "the scores of gate 'block1' hold")])
def test_a_network_of_nan_is_not_measured(where: str, what: str, verb: str, channels_last: bool, tmp_path: Path) -> None:
    network = skipnet()
    with torch.no_grad():
        network.get_submodule(where).bias.fill_(torch.nan)
    task = DynamicTraining(network, channels_last=channels_last)
    with pytest.raises(ValueError, match=f"{what} NaN or infinity for image 0 of the batch: nothing was recorded"):
        getattr(trainer(tmp_path), verb)(task, digits(), verbose=False)
    assert task.evaluation.flops.images == 0


def test_the_image_whose_output_is_nan_is_named(tmp_path: Path) -> None:
    network = skipnet()

    def spoil(module: Any, inputs: Any, output: DynamicOutput) -> None:
        if len(output.logits) > 5:
            output.logits[5, 2] = torch.nan

    network.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="logits hold NaN or infinity for image 5 of the batch"):
        trainer(tmp_path).validate(DynamicTraining(network), digits(), verbose=False)


def test_training_stops_at_a_loss_of_nan_and_takes_no_step(tmp_path: Path) -> None:
    network = skipnet()
    with torch.no_grad():
        network.trunk.head.bias[3] = torch.nan
    before = network.trunk.stem[0].weight.clone()
    with pytest.raises(ValueError, match="the cross_entropy term of the loss is nan at step 0; lower the learning rate"):
        trainer(tmp_path, limit_val_batches=0).fit(DynamicTraining(network), digits())
    assert torch.equal(network.trunk.stem[0].weight, before)


@pytest.mark.parametrize("verb", ["fit", "validate", "test"])
def test_a_network_with_too_few_classes_says_so(verb: str, tmp_path: Path) -> None:
    message = r"labels span \d to \d, but the network has 5 classes \(0 to 4\); set the network's num_classes to the data's"
    with pytest.raises(ValueError, match=message):
        getattr(trainer(tmp_path), verb)(DynamicTraining(skipnet(num_classes=5)), digits())


def test_pixels_that_are_no_image_are_refused(tmp_path: Path) -> None:
    bytes_as_floats = [batch._replace(images=255 * batch.images) for batch in batches(digits(), "test")]
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\]; image 0 of the batch spans"):
        trainer(tmp_path).test(DynamicTraining(skipnet()), DataLoader(bytes_as_floats, batch_size=None), verbose=False)


def test_channels_last_changes_the_layout_and_no_figure(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    figures = []
    for channels_last in (True, False):
        network = skipnet()
        network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        figures += trainer(tmp_path, limit_test_batches=1).test(DynamicTraining(network, channels_last=channels_last), digits(), verbose=False)
        assert seen[-1].is_contiguous(memory_format=torch.channels_last) == channels_last
    assert figures[0] == figures[1]
