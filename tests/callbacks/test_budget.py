"""The exits' budget: shares of the training images that each stage answers, on one process and on two."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.training import QUIET, digits, skipnet, trainer
from torch import Tensor
from torch.nn import functional

from gatewatt.callbacks.budget import SMALLEST_DOUBT, ExitBudget, doubt, network_and_data, shares, thresholds
from gatewatt.data import DigitsData
from gatewatt.data.splits import subset
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, DynamicOutput, exit_score
from gatewatt.networks.dvt import DVT
from gatewatt.objectives import CrossEntropy, Objective
from gatewatt.objectives.base import Terms
from gatewatt.tasks import DynamicTraining, Optimization

pytestmark = QUIET

IMAGES = 90


def cascade() -> DVT:
    """An untrained cascade whose exits are sure of some digits and not of others; seeded, and in train mode."""
    torch.manual_seed(4)
    network = DVT("small-32", 10, dim=8, depth=1, heads=1, drop_path=0.5)
    with torch.no_grad():
        for stage in network.stages:
            stage.head.weight.mul_(60)
    return network


class EveryExit(Objective):
    """Asks all exits alike, so that nothing of the training depends on where an image stops."""

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        assert output.exits is not None
        return {"cross_entropy": torch.stack([functional.cross_entropy(logits, labels) for logits in output.exits.unbind(1)]).sum()}


def task(network: DynamicNetwork | None = None) -> DynamicTraining:
    objective = CrossEntropy() if network else EveryExit()
    return DynamicTraining(network or cascade(), objective, Optimization(lr=0.01, schedule="constant"))


def fitted(folder: Path, *callbacks: L.Callback, **settings: Any) -> DVT:
    """A cascade after a fit of three steps."""
    module, data = task(), digits()
    trainer(folder, callbacks=list(callbacks), **{"limit_train_batches": 3, **settings}).fit(module, datamodule=data)
    return module.network


def stops(network: DVT, images: Tensor) -> list[int]:
    """How many images each stage answers."""
    with torch.no_grad():
        gates = copy.deepcopy(network).eval()(images, "skipped").gates
    second, third = (int(gate.executed.sum()) for gate in gates.values())
    return [len(images) - second, second - third, third]


def calibration_images() -> Tensor:
    """The first images of the seeded permutation, as they are."""
    split = digits().split("train")
    return split.images[subset(len(split), IMAGES, 0)].float() / 255


# ---- the budget as arithmetic ----


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0, 2.95])
def test_shares_are_powers_of_p_and_add_up_to_one(p: float) -> None:
    first, second, third = shares(p)
    assert second / first == pytest.approx(p)
    assert third / second == pytest.approx(p)
    assert first + second + third == pytest.approx(1)


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0, 2.95])
@pytest.mark.parametrize("count", [3, 10, 1000])
def test_thresholds_give_every_stage_its_share(p: float, count: int) -> None:
    doubts = torch.rand(count, 2, generator=torch.Generator().manual_seed(count)) * 0.9
    limits = thresholds(doubts, shares(p))
    passed = doubts[:, 0] >= limits[0]
    found = [int((~passed).sum()), int((doubts[passed, 1] < limits[1]).sum()), int((doubts[passed, 1] >= limits[1]).sum())]
    for images, share in zip(found, shares(p), strict=True):
        assert images == pytest.approx(share * count, abs=1.001)
    # The gate decides as the arithmetic does.
    scores = doubts[:, 0].double() / (doubts[:, 0].double() + limits[0].double())
    assert torch.equal(scores >= 0.5, passed)


def test_images_that_cannot_be_told_apart_go_on_together() -> None:
    doubts = torch.tensor([[0.3, 0.1]] * 4 + [[0.1, 0.0]])
    limits = thresholds(doubts, [0.6, 0.2, 0.2])
    assert (doubts[:, 0] >= limits[0]).tolist() == [True] * 4 + [False]
    assert (doubts[:4, 1] >= limits[1]).all()


def test_a_network_that_is_sure_of_everything_gets_a_threshold_all_the_same() -> None:
    limits = thresholds(torch.zeros(6, 2), shares(1.0))
    assert limits.tolist() == pytest.approx([SMALLEST_DOUBT] * 2)
    sure = torch.tensor([[200.0, 0.0]])
    assert exit_score(sure, 1 - limits[0].double()).item() == 0


def test_doubt_is_what_the_gate_compares() -> None:
    logits = torch.tensor([[3.0, 0.0, 1.0], [30.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected = logits.double().softmax(1).sort(1).values[:, :2].sum(1, keepdim=True)
    torch.testing.assert_close(doubt(logits).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("p", [0.0, -1.0, float("nan"), float("inf"), 1e-9])
def test_a_budget_that_is_no_positive_number_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="p must be in"):
        ExitBudget(p)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(ValueError, match="images must be at least 2, got 1; leave it out for 50,000"):
        ExitBudget(images=1)


# ---- within a fit ----


@pytest.mark.parametrize(("p", "expected"), [(1.0, [30, 30, 30]), (0.5, [51, 26, 13]), (2.0, [13, 26, 51])])
def test_after_a_fit_the_stages_answer_their_shares_of_the_training_images(p: float, expected: list[int], tmp_path: Path) -> None:
    network = fitted(tmp_path, ExitBudget(p, images=IMAGES))
    for found, wanted in zip(stops(network, calibration_images()), expected, strict=True):
        # A batch of another size rounds differently, which can move an image over its threshold.
        assert abs(found - wanted) <= 1


def test_validation_measures_the_calibrated_network_and_logs_the_thresholds(tmp_path: Path) -> None:
    module, data = task(), digits()
    run = trainer(tmp_path, limit_train_batches=2, callbacks=[ExitBudget(images=IMAGES)])
    run.fit(module, datamodule=data)
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    confidence = module.network.confidence.tolist()
    assert [logged["val/confidence1"], logged["val/confidence2"]] == pytest.approx(confidence)
    assert confidence != [0.5, 0.5]
    again = trainer(tmp_path)
    again.validate(module, datamodule=data, verbose=False)
    assert again.callback_metrics["val/flops_clean"].item() == logged["val/flops_clean"]


@pytest.mark.parametrize("settings", [{"limit_val_batches": 0}, {"val_check_interval": 2, "limit_train_batches": 3}])
def test_the_last_step_is_calibrated_even_if_no_validation_follows_it(settings: dict[str, Any], tmp_path: Path) -> None:
    budget = ExitBudget(images=IMAGES)
    network = fitted(tmp_path, budget, **settings)
    assert budget.calibrated_at == 3
    assert max(abs(found - 30) for found in stops(network, calibration_images())) <= 1


def test_a_validation_alone_and_the_sanity_check_calibrate_nothing(tmp_path: Path) -> None:
    module = task()
    trainer(tmp_path, callbacks=[ExitBudget(images=IMAGES)]).validate(module, datamodule=digits(), verbose=False)
    assert module.network.confidence.tolist() == [0.5, 0.5]
    seen: list[list[float]] = []

    class Watch(L.Callback):
        def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.append(module.network.confidence.tolist())

    trainer(tmp_path, callbacks=[ExitBudget(images=IMAGES), Watch()], num_sanity_val_steps=1, limit_train_batches=1).fit(module, datamodule=digits())
    assert seen == [[0.5, 0.5]]


def test_calibrating_changes_nothing_of_the_training_but_the_thresholds(tmp_path: Path) -> None:
    # drop_path draws in every step, so a disturbed random state would show.
    states = [fitted(tmp_path, *callbacks, max_epochs=2).state_dict() for callbacks in ([], [ExitBudget(images=20)])]
    differing = [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]
    assert differing == ["doubt"]


def test_the_images_are_not_augmented_and_the_network_is_in_eval_mode(tmp_path: Path) -> None:
    module, data = task(), DigitsData(batch_size=16, eval_batch_size=32, crop_padding=8, val_images=8)
    data.setup()
    run = trainer(tmp_path, limit_train_batches=1)
    run.fit(module, datamodule=data)
    module.network.train()
    state = torch.get_rng_state()
    confidence = ExitBudget(images=IMAGES).calibrate(run, module)
    assert torch.equal(torch.get_rng_state(), state)
    assert module.network.training
    split = data.split("train")
    images = split.images[subset(len(split), IMAGES, 0)].float() / 255
    with torch.no_grad():
        exits = copy.deepcopy(module.network).eval()(images).exits
    doubts = torch.cat([doubt(exits[:, stage]) for stage in range(2)], dim=1)
    torch.testing.assert_close(confidence, 1 - thresholds(doubts, shares(1.0)).double(), rtol=0, atol=1e-4)
    split = data.split("train").augmented(None)
    assert len(split) > IMAGES


def test_more_images_than_there_are_means_all(tmp_path: Path) -> None:
    found = []
    for images in (None, 50_000):
        module = task()
        run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0, callbacks=[ExitBudget(images=images)])
        run.fit(module, datamodule=digits())
        found.append(module.network.confidence.tolist())
    assert found[0] == found[1]


def test_a_network_of_nan_is_not_calibrated(tmp_path: Path) -> None:
    module = task()
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(module, datamodule=digits())
    with torch.no_grad():
        module.network.stages[2].head.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits hold NaN or infinity for image 0 of the batch"):
        ExitBudget(images=IMAGES).calibrate(run, module)
    assert module.network.confidence.tolist() == [0.5, 0.5]


def test_what_cannot_be_calibrated_is_refused_before_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=1, callbacks=[ExitBudget(images=IMAGES)])
    with pytest.raises(TypeError, match="ExitBudget calibrates the exits of a DVT, got SkipNet; leave the callback out"):
        run.fit(task(skipnet()), datamodule=digits())
    loaders = digits().train_dataloader(), digits().val_dataloader()
    with pytest.raises(TypeError, match="clean training images of a module of gatewatt.data, got NoneType"):
        trainer(tmp_path, limit_train_batches=1, callbacks=[ExitBudget(images=IMAGES)]).fit(task(), *loaders)


# ---- several processes ----


class Half:
    """Stands in for one of two processes: its batches are every second one, and what both measured is added up at the end."""

    def __init__(self, run: L.Trainer, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.datamodule, self.global_step, self.strategy = run.datamodule, run.global_step, self  # type: ignore[attr-defined]
        self.parts: list[Tensor] = []
        monkeypatch.setattr("gatewatt.data.order.process", lambda: (rank, 2))

    def reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "sum"
        self.parts.append(tensor)
        return tensor


def test_two_processes_measure_every_image_once_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = task()
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=0)
    run.fit(module, datamodule=digits())
    budget = ExitBudget(images=IMAGES)
    network, data = network_and_data(run, module)
    whole = budget._doubts(run, module, network, data)
    parts = [budget._doubts(Half(run, rank, monkeypatch), module, network, data) for rank in range(2)]  # type: ignore[arg-type]
    assert (whole > 0).all()
    assert all(0 < int((part > 0).all(1).sum()) < IMAGES for part in parts)
    assert torch.equal(parts[0] + parts[1], whole)


def calibrate_alone(rank: int, world: int, port: int, root: str) -> None:
    """One of two real processes; writes the thresholds that it set."""
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    module = task()
    # No step is taken, so that both runs calibrate the same weights.
    run = trainer(Path(root), strategy="ddp", devices=world, limit_train_batches=1, limit_val_batches=1)
    module.optimization = Optimization(lr=1e-12, momentum=0.0, weight_decay=0.0, schedule="constant")
    run.callbacks.append(ExitBudget(images=IMAGES))  # type: ignore[attr-defined]
    run.fit(module, datamodule=digits())
    torch.save(module.network.doubt, Path(root) / f"{rank}.pt")


@pytest.mark.ddp
@pytest.mark.slow
def test_two_real_processes_set_the_thresholds_of_one(tmp_path: Path) -> None:
    import multiprocessing
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=calibrate_alone, args=(rank, 2, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(170)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    module = task()
    module.optimization = Optimization(lr=1e-12, momentum=0.0, weight_decay=0.0, schedule="constant")
    trainer(tmp_path, limit_train_batches=1, limit_val_batches=1, callbacks=[ExitBudget(images=IMAGES)]).fit(module, datamodule=digits())
    assert torch.equal(first, second)
    torch.testing.assert_close(first, module.network.doubt, rtol=1e-5, atol=0)
