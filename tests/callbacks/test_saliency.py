"""The calibration of ManiDP against means taken outside of it, through resumes, early ends and attacks in the loop."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.training import QUIET, batches, digits, skipnet, trainer
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.attacks import GradMDM
from gatewatt.callbacks.saliency import SaliencyCalibration, SaliencySums, remaining_rate, threshold_of
from gatewatt.data import Batch
from gatewatt.gating import DynamicOutput
from gatewatt.networks.manidp import UNCALIBRATED, ManiDP
from gatewatt.objectives import EnergyAdversarialObjective
from gatewatt.objectives.manifold import ManifoldPruning
from gatewatt.tasks import DynamicTraining, EnergyAdversarialTraining, Optimization

pytestmark = QUIET

STEADY = Optimization(lr=0.02, schedule="constant")


def manidp() -> ManiDP:
    """Untrained, with BatchNorm statistics that fit the digits."""
    torch.manual_seed(8)
    network = ManiDP(8, width=4)
    with torch.no_grad():
        network.train()(torch.cat([batch.images for split in ("val", "test") for batch in batches(digits(), split)]))
    return network.eval()


class Step:
    """What a training step saw and what held after it."""

    def __init__(self, output: DynamicOutput) -> None:
        self.aux = {name: value.detach().clone() for name, value in output.aux.items()}
        self.logits = output.logits.detach().clone()
        self.labels = torch.empty(0)
        self.state: dict[str, Tensor] = {}
        self.reference: float | None = None
        self.used: float | None = None


class Record(L.Callback):
    """Notes every training pass; stands behind the calibration in the list of callbacks."""

    def __init__(self) -> None:
        self.epochs: dict[int, list[Step]] = {}
        self.latest: list[Step] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, DynamicTraining)

        def note(module: nn.Module, inputs: Any, output: DynamicOutput) -> None:
            if module.training:
                self.latest.append(Step(output))
                self.latest[-1].used = getattr(pl_module.objective, "reference", None)

        self.handle = pl_module.network.register_forward_hook(note)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        assert isinstance(pl_module, DynamicTraining)
        (step,) = self.latest
        self.latest.clear()
        step.labels = batch.labels
        step.state = copy.deepcopy(pl_module.network.state_dict())
        self.epochs.setdefault(trainer.current_epoch, []).append(step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.handle.remove()

    @property
    def steps(self) -> list[Step]:
        return [step for steps in self.epochs.values() for step in steps]


def fit(folder: Path, *callbacks: L.Callback, task: DynamicTraining | None = None, **settings: Any) -> tuple[L.Trainer, DynamicTraining]:
    task = task or DynamicTraining(manidp(), ManifoldPruning(), STEADY)
    run = trainer(folder, callbacks=list(callbacks), **{"limit_train_batches": 2, "limit_val_batches": 0, **settings})
    run.fit(task, digits())
    return run, task


def expected(saliencies: dict[str, list[Tensor]], responses: dict[str, list[Tensor]], rate: float) -> dict[str, float]:
    """Thresholds and spreads by sorting, of images given batch by batch."""
    values = {}
    for name, parts in saliencies.items():
        path = "blocks." + name.removeprefix("block")
        means = sorted(torch.cat(parts).double().mean(0).tolist(), reverse=True)
        values[f"{path}.xi"] = means[math.ceil(round(rate * len(means), 9)) - 1]
        values[f"{path}.spread"] = torch.cat(responses[name]).double().std(unbiased=False).item()
    return values


def calibration(state: dict[str, Tensor]) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in state.items() if name.endswith((".xi", ".spread"))}


def of_steps(steps: list[Step], rate: float) -> dict[str, float]:
    names = [key.removeprefix("saliency/") for key in steps[0].aux if key.startswith("saliency/")]
    kinds = ({name: [step.aux[f"{kind}/{name}"] for step in steps] for name in names} for kind in ("saliency", "response"))
    return expected(*kinds, rate)


def of_weights(state: dict[str, Tensor], count: int, rate: float) -> dict[str, float]:
    """Of a pass of these weights over the first training batches, in eval mode."""
    network = manidp()
    network.load_state_dict(state)
    loader = digits().train_dataloader()
    with torch.no_grad():
        outputs = [network(batch.images) for batch, _ in zip(loader, range(count), strict=False)]
    kinds = ({name: [output.aux[f"{kind}/{name}"] for output in outputs] for name in network.masks} for kind in ("saliency", "response"))
    return expected(*kinds, rate)


def with_calibration_of(weights: dict[str, Tensor], thresholds: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: thresholds[name] if name.endswith((".xi", ".spread")) else tensor for name, tensor in weights.items()}


# ---- the schedule ----


def test_the_rate_falls_along_half_a_cosine() -> None:
    for epochs in (1, 2, 5, 400):
        rates = [remaining_rate(epoch, epochs, 0.6) for epoch in range(epochs)]
        assert rates == [pytest.approx(0.2 * math.cos(math.pi * (epoch + 1) / epochs) + 0.8) for epoch in range(epochs)]
        assert rates[-1] == pytest.approx(0.6)
        assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("rate", "count", "kept"), [(0.6, 16, 10), (0.1, 30, 3), (0.7, 10, 7), (1.0, 16, 16), (0.01, 16, 1), (0.5, 5, 3)])
def test_the_threshold_is_the_smallest_of_the_means_to_keep(rate: float, count: int, kept: int) -> None:
    means = torch.rand(count)
    threshold = threshold_of(means, rate)
    assert int((means >= threshold).sum()) == kept
    assert threshold in means


# ---- after each epoch ----


def test_thresholds_follow_from_the_means_of_their_own_epoch_and_at_last_from_the_final_weights(tmp_path: Path) -> None:
    record = Record()
    _, task = fit(tmp_path, SaliencyCalibration(0.6), record, max_epochs=4)
    first, second, third, last = record.epochs.values()
    # Not after the first epoch, and not in the middle of one.
    for step in (*first, second[0]):
        values = calibration(step.state)
        assert {values[name] for name in values if name.endswith(".xi")} == {UNCALIBRATED}
    assert calibration(second[1].state) == pytest.approx(of_steps(second, 0.8), rel=1e-5)
    assert calibration(third[0].state) == calibration(second[1].state)
    assert calibration(third[1].state) == pytest.approx(of_steps(third, remaining_rate(2, 4, 0.6)), rel=1e-5)
    before = with_calibration_of(last[1].state, last[0].state)
    assert calibration(last[0].state) == calibration(third[1].state)
    assert calibration(last[1].state) == pytest.approx(of_weights(before, 2, 0.6), rel=1e-4)
    assert calibration(last[1].state) != pytest.approx(of_steps(last, 0.6), rel=1e-3), "sums of moving weights would be something else"
    assert calibration(task.network.state_dict()) == calibration(last[1].state)


def test_a_calibrated_network_keeps_about_the_rate_and_not_the_same_for_all(tmp_path: Path) -> None:
    _, task = fit(tmp_path, SaliencyCalibration(0.6), max_epochs=2, limit_train_batches=8)
    images = torch.cat([batch.images for batch in batches(digits(), "test")])
    with torch.no_grad():
        gates = task.network.eval()(images).gates
    rates = torch.cat([gate.executed for gate in gates.values()], 1).mean(1)
    assert 0.4 < rates.mean() < 0.8
    assert len(rates.unique()) > 3


def test_the_last_validation_measures_the_network_as_it_is_left(tmp_path: Path) -> None:
    run, task = fit(tmp_path, SaliencyCalibration(0.5), max_epochs=2, limit_val_batches=1.0)
    logged = {name: value.item() for name, value in run.callback_metrics.items() if name.startswith("val/")}
    (again,) = trainer(tmp_path).validate(task, digits(), verbose=False)
    assert logged == again
    assert again["val/flops_fraction"] < 0.9


def test_the_extra_pass_may_be_short(tmp_path: Path) -> None:
    record = Record()
    fit(tmp_path, SaliencyCalibration(0.6, batches=1), record, max_epochs=1, limit_train_batches=3)
    last = record.steps[-1].state
    before = with_calibration_of(last, record.steps[0].state)
    assert calibration(last) == pytest.approx(of_weights(before, 1, 0.6), rel=1e-4)


# ---- the reference ----


def test_the_reference_is_the_parents_loss_at_first_and_then_that_of_the_epoch_before(tmp_path: Path) -> None:
    record, network = Record(), manidp()
    with torch.no_grad():
        seen = [batch for batch, _ in zip(digits().train_dataloader(), range(2), strict=False)]
        parent = [functional.cross_entropy(network(batch.images, "dense").logits, batch.labels).item() for batch in seen]
    fit(tmp_path, SaliencyCalibration(), record, max_epochs=3)
    means = [sum(functional.cross_entropy(step.logits, step.labels).item() for step in steps) / len(steps) for steps in record.epochs.values()]
    used = [[step.used for step in steps] for steps in record.epochs.values()]
    assert used == [[pytest.approx(value)] * 2 for value in (sum(parent) / 2, means[0], means[1])]


def test_watching_does_not_change_the_training(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [SaliencyCalibration(0.6)], [SaliencyCalibration(0.9, batches=1)]):
        _, task = fit(tmp_path, *callbacks, task=DynamicTraining(manidp(), optimization=STEADY), max_epochs=2)
        states.append(with_calibration_of(task.network.state_dict(), manidp().state_dict()))
    for state in states[1:]:
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


# ---- runs that end or begin elsewhere ----


class Save(L.Callback):
    """Saves after a step, like a request to stop."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [2, 5, 6])
def test_a_resumed_run_ends_with_the_same_weights_thresholds_and_reference(step: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "x.ckpt"
    whole, settings = SaliencyCalibration(), {"max_epochs": 3, "limit_train_batches": 3}
    _, first = fit(tmp_path, whole, Save(step, checkpoint), **settings)
    again, second = SaliencyCalibration(), DynamicTraining(manidp(), ManifoldPruning(), STEADY)
    run = trainer(tmp_path, callbacks=[again], limit_val_batches=0, **settings)
    run.fit(second, digits(), ckpt_path=checkpoint, weights_only=True)
    assert run.global_step == 9
    assert all(torch.equal(tensor, second.network.state_dict()[name]) for name, tensor in first.network.state_dict().items())
    assert again.reference == whole.reference
    assert second.objective.reference == first.objective.reference  # type: ignore[attr-defined]


class Early(L.Callback):
    """Asks for an end after an epoch."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def test_a_run_that_stops_early_takes_its_thresholds_from_the_final_weights(tmp_path: Path) -> None:
    record = Record()
    _, task = fit(tmp_path, SaliencyCalibration(), record, Early(), max_epochs=5)
    assert list(record.epochs) == [0, 1]
    found = calibration(task.network.state_dict())
    assert found == pytest.approx(of_weights(record.steps[-1].state, 2, remaining_rate(1, 5, 0.6)), rel=1e-4)
    assert found != calibration(record.steps[-1].state)


def test_a_run_that_ends_within_an_epoch_is_calibrated(tmp_path: Path) -> None:
    record = Record()
    fit(tmp_path, SaliencyCalibration(), record, max_epochs=4, max_steps=3)
    assert len(record.steps) == 3
    before = with_calibration_of(record.steps[2].state, record.steps[1].state)
    assert calibration(record.steps[2].state) == pytest.approx(of_weights(before, 2, remaining_rate(1, 4, 0.6)), rel=1e-4)


def test_attacked_images_are_not_counted(tmp_path: Path) -> None:
    class Watch(Record):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            counts.append({name: total.clone() for name, total in saliency.sums.totals.items()})

    counts: list[dict[str, Tensor]] = []
    saliency, record = SaliencyCalibration(), Watch()
    objective = EnergyAdversarialObjective(ManifoldPruning(), distillation=0)
    task = EnergyAdversarialTraining(manidp(), GradMDM(steps=2, warmup=0.0), objective, STEADY)
    fit(tmp_path, saliency, record, task=task, max_epochs=2)
    (step, second), *_ = record.epochs.values()
    assert len(step.logits) == 32
    assert counts[0]["images"].item() == 16
    for name in task.network.masks:  # type: ignore[union-attr, operator]
        torch.testing.assert_close(counts[0][f"saliency/{name}"], step.aux[f"saliency/{name}"][:16].double().sum(0))
    losses = [functional.cross_entropy(each.logits[:16], each.labels).item() for each in (step, second)]
    assert record.epochs[1][0].used == pytest.approx(sum(losses) / 2)


def test_no_hook_is_left_behind(tmp_path: Path) -> None:
    class Fault(L.Callback):
        def on_train_batch_end(self, *arguments: object) -> None:
            raise RuntimeError("boom")

    _, task = fit(tmp_path, SaliencyCalibration())
    assert not task.network._forward_hooks
    task = DynamicTraining(manidp(), ManifoldPruning(), STEADY)
    with pytest.raises(RuntimeError, match="boom"):
        fit(tmp_path, SaliencyCalibration(), Fault(), task=task)
    assert not task.network._forward_hooks


# ---- several processes ----


def train_alone(rank: int, world: int, port: int, root: str) -> None:
    """One of two real processes; writes what its steps saw and the state after each."""
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    record = Record()
    fit(Path(root), SaliencyCalibration(), record, max_epochs=3, strategy="ddp", devices=world)
    torch.save([(step.aux, step.logits, step.labels, step.state, step.used) for step in record.steps], Path(root) / f"{rank}.pt")


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_share_their_means(tmp_path: Path) -> None:
    import multiprocessing
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=train_alone, args=(rank, 2, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(170)
        assert process.exitcode == 0
    ranks = []
    for rank in range(2):
        ranks.append([])
        for aux, logits, labels, state, used in torch.load(tmp_path / f"{rank}.pt"):
            step = Step(DynamicOutput(logits, {}, aux=aux))
            step.labels, step.state, step.used = labels, state, used
            ranks[-1].append(step)
    first, second = ranks
    # Steps 2 and 3 are the second epoch, step 5 ends the last.
    assert not torch.equal(first[2].logits, second[2].logits)
    assert calibration(first[3].state) == calibration(second[3].state)
    assert calibration(first[5].state) == calibration(second[5].state)
    assert calibration(first[3].state) == pytest.approx(of_steps([*first[2:4], *second[2:4]], remaining_rate(1, 3, 0.6)), rel=1e-5)
    losses = [functional.cross_entropy(step.logits, step.labels).item() for step in (*first[:2], *second[:2])]
    assert [step.used for step in (first[2], second[2])] == [pytest.approx(sum(losses) / 4)] * 2


def test_every_sum_runs_over_all_processes() -> None:
    network, sums, asked = manidp(), SaliencySums(), []

    def reduce(value: Tensor, reduce_op: str) -> Tensor:
        asked.append(reduce_op)
        return value + 1

    batch = batches(digits(), "val")[0]
    sums.add(network(batch.images), batch.labels)
    everywhere = sums.over_processes(SimpleNamespace(strategy=SimpleNamespace(reduce=reduce)))  # type: ignore[arg-type]
    assert asked == ["sum"] * (2 + 2 * len(network.masks))
    assert everywhere["images"].item() == 9
    assert all(torch.equal(total + 1, everywhere[name]) for name, total in sums.totals.items())


# ---- what is refused ----


@pytest.mark.parametrize("settings", [{"rate": 0.0}, {"rate": 1.2}, {"batches": 0}])
def test_a_value_out_of_range_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\]|batches must be at least 1"):
        SaliencyCalibration(**settings)


def test_another_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="sets the thresholds of a ManiDP, and the network is a SkipNet"):
        fit(tmp_path, SaliencyCalibration(), task=DynamicTraining(skipnet(), optimization=STEADY))


def test_a_run_without_a_number_of_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set trainer.max_epochs, got -1"):
        fit(tmp_path, SaliencyCalibration(), max_epochs=-1, max_steps=4)
