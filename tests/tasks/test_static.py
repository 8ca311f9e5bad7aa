"""The static comparator: which route, what is trained, and that it is found again whole; and the comparators that other tasks train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.training import QUIET, batches, digits, skipnet, trainer

from gatewatt.attacks import AccuracyPGD, LinfBall
from gatewatt.callbacks import ExportCheckpoint, GateReport
from gatewatt.cli import main
from gatewatt.defenses import BudgetGuard, bare, busiest_route
from gatewatt.flops import price
from gatewatt.networks.checkpoint import load, save
from gatewatt.objectives import ComputeTarget, EnergyAdversarialObjective
from gatewatt.tasks import DynamicTraining, EnergyAdversarialTraining, Optimization
from gatewatt.tasks.static import StaticTraining

pytestmark = QUIET

STEADY = Optimization(lr=0.02, schedule="constant")
DEEP = {"depth": 14, "width": 4}


@pytest.fixture
def dynamic(tmp_path: Path) -> str:
    """The checkpoint of a dynamic network."""
    save(skipnet(**DEEP), tmp_path / "dynamic.safetensors", card={})
    return str(tmp_path / "dynamic.safetensors")


def test_the_route_is_the_busiest_within_the_budget_and_alone_is_trained(tmp_path: Path, dynamic: str) -> None:
    task = StaticTraining(skipnet(1, **DEEP), 0.75, optimization=STEADY, checkpoint=dynamic, images=24)
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=1, callbacks=[GateReport(), ExportCheckpoint("static")])
    run.fit(task, digits())

    network, images = load(dynamic), task.choosing_images()
    assert len(images) == 24
    route, ledger = busiest_route(network, images, 0.75), price(load(dynamic), images[:1])
    assert task.network.open_gates == route
    assert 0 < len(route) < 5
    assert ledger.fixed < task.ledger.dense <= 0.75 * ledger.dense
    assert run.callback_metrics["val/flops_fraction"] == 1

    before, after = network.state_dict(), bare(task.network).state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    closed = tuple(f"trunk.blocks.{index}.residual" for index in range(1, 6) if f"block{index}" not in route)
    assert not any(name.startswith(("gating", *closed)) for name in moved)
    assert {f"trunk.blocks.{name.removeprefix('block')}.residual" for name in route} <= {name.rpartition(".")[0].rpartition(".")[0] for name in moved}


def test_gatewatt_test_reads_what_was_exported(tmp_path: Path, dynamic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = StaticTraining(skipnet(1, **DEEP), 0.75, optimization=STEADY, checkpoint=dynamic, images=24)
    trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[ExportCheckpoint("static")]).fit(task, digits())
    (tmp_path / "small.yaml").write_text(
        "model: {init_args: {network: {class_path: gatewatt.networks.SkipNet, init_args: {depth: 14, width: 4, num_classes: 10}}}}\n"
        "data: {init_args: {test_images: 6}}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false, logger: false}\n"
    )
    fragments = [word for name in ("task/attack", "data/digits", "attack/gradmdm", "defense/static", "small.yaml") for word in ("-c", name)]
    file = "static.safetensors"
    flags = ["--model.checkpoint", file, "--model.defense.open_gates", file, "--model.attack.steps", "2", "--run", "static"]
    assert main(["test", *fragments, *flags]) == 0
    summary = json.loads((tmp_path / "runs" / "static" / "summary.json").read_text())
    assert summary["defense"] == {"name": "FixedRoute", "open_gates": list(task.network.open_gates)}
    assert summary["flops_clean"] == summary["flops_adversarial"] == summary["flops_adversarial_max"] == summary["flops_dense"] == task.ledger.dense
    assert summary["recovery_percent"] is None
    assert summary["routes_clean"] == 1


def test_a_static_checkpoint_keeps_its_route(tmp_path: Path) -> None:
    file = tmp_path / "static.safetensors"
    save(skipnet(**DEEP), file, card={"defense": {"name": "FixedRoute", "open_gates": ["block1", "block4"]}})
    task = StaticTraining(skipnet(1, **DEEP), 1.0, optimization=STEADY, checkpoint=str(file))
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, digits())
    assert task.network.open_gates == ("block1", "block4")


def test_from_scratch_the_checkpoint_only_chooses(tmp_path: Path, dynamic: str) -> None:
    fresh = skipnet(1, **DEEP)
    expected = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    task = StaticTraining(fresh, 0.75, checkpoint=dynamic, from_scratch=True, images=24)
    trainer(tmp_path, limit_val_batches=1).validate(task, digits(), verbose=False)
    assert task.network.open_gates == busiest_route(load(dynamic), task.choosing_images(), 0.75)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in bare(task.network).state_dict().items())


def test_a_resumed_run_keeps_its_route(tmp_path: Path, dynamic: str) -> None:
    def task(checkpoint: str | None, seed: int) -> StaticTraining:
        return StaticTraining(skipnet(seed, **DEEP), 0.6, optimization=STEADY, checkpoint=checkpoint, images=24)

    whole, broken, resumed = task(dynamic, 1), task(dynamic, 1), task(None, 5)
    settings = {"limit_train_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path, max_epochs=2, **settings).fit(whole, digits())
    first = trainer(tmp_path, max_epochs=1, **settings)
    first.fit(broken, digits())
    first.save_checkpoint(tmp_path / "x.ckpt")
    trainer(tmp_path, max_epochs=2, **settings).fit(resumed, digits(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert resumed.network.open_gates == whole.network.open_gates
    assert all(torch.equal(tensor, whole.network.state_dict()[name]) for name, tensor in resumed.network.state_dict().items())


def test_what_cannot_be_chosen_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget must be in \(0, 1\], a share of the dense FLOPs, got 1.5"):
        StaticTraining(skipnet(), 1.5)
    with pytest.raises(ValueError, match="images must be at least 1, got 0"):
        StaticTraining(skipnet(), 0.5, images=0)
    with pytest.raises(ValueError, match="fixed without a defense, got BudgetGuard: train without, test behind it"):
        StaticTraining(BudgetGuard(skipnet(**DEEP), 0.6), 0.5)
    with pytest.raises(ValueError, match="route is chosen on training images: give the trainer a data module of gatewatt.data"):
        trainer(tmp_path).validate(StaticTraining(skipnet(), 0.9), digits().val_dataloader(), verbose=False)


def test_accuracy_adversarial_training_is_the_same_task_with_another_attack(tmp_path: Path) -> None:
    attack = AccuracyPGD(space=LinfBall(8 / 255), steps=3)
    objective = EnergyAdversarialObjective(ComputeTarget(0.7), distillation=0.0)
    task = EnergyAdversarialTraining(skipnet(), attack, objective, STEADY)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(task, digits())
    # What was crafted is worse for the prediction than the clean half; untrained as it is, the difference is small.
    assert run.callback_metrics["train/adversarial_cross_entropy"] > run.callback_metrics["train/cross_entropy"]
    assert "train/distillation" not in run.callback_metrics


def test_a_network_is_trained_with_its_guard_on(tmp_path: Path) -> None:
    guarded = BudgetGuard(skipnet(**DEEP), 0.6)
    task = DynamicTraining(guarded, optimization=STEADY)
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=2, callbacks=[ExportCheckpoint("guarded")])
    run.fit(task, digits())
    for batch in batches(digits(), "val"):
        with torch.no_grad():
            assert guarded.plan.ledger(guarded.eval()(batch.images).gates).max() <= guarded.certificate
    assert run.callback_metrics["val/flops_fraction"] <= 0.6
