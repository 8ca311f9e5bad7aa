"""Recovery during validation against a computation outside of any trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.toys import Levels, Nudge
from tests.training import QUIET, batches, digits, skipnet, trainer

from gatewatt.attacks import EnergyAttack, GradMDM, LinfBall
from gatewatt.callbacks import RecoveryCallback
from gatewatt.callbacks.recovery import title
from gatewatt.defenses import JPEG, Defended, FixedRoute
from gatewatt.flops import audit
from gatewatt.objectives import EnergyAdversarialObjective
from gatewatt.tasks import DynamicTraining, EnergyAdversarialTraining, Optimization

pytestmark = QUIET

ATTACK = GradMDM(gamma=1.0, steps=5, lr=0.05)
STEADY = Optimization(lr=0.02, schedule="constant")


@pytest.mark.parametrize("images", [8, 10, 1000])
def test_what_is_logged_is_what_the_first_images_say(images: int, tmp_path: Path) -> None:
    task = DynamicTraining(skipnet(), optimization=STEADY)
    run = trainer(tmp_path, limit_train_batches=2, callbacks=[RecoveryCallback(ATTACK, images=images)])
    run.fit(task, digits())
    network, taken = task.network.eval(), 0
    clean = adversarial = rounded = error = 0.0
    for batch in batches(digits(), "val"):
        chosen = batch.images[: max(0, images - taken)].contiguous(memory_format=torch.channels_last)
        if len(chosen) == 0:
            break
        attacked = ATTACK(network, chosen).images
        clean += audit(network, chosen)
        adversarial += audit(network, attacked)
        rounded += audit(network, (255 * attacked).round() / 255)
        error += (255 * (attacked.double() - chosen.double())).square().mean((1, 2, 3)).sum().item()
        taken += len(chosen)
    assert taken == min(images, 12)
    room = taken * task.ledger.dense - clean
    logged = {name: value.item() for name, value in run.callback_metrics.items()}
    assert logged["val/recovery_percent"] == pytest.approx(100 * (adversarial - clean) / room)
    assert logged["val/recovery_8bit_percent"] == pytest.approx(100 * (rounded - clean) / room)
    assert logged["val/flops_adversarial"] == pytest.approx(adversarial / taken)
    assert logged["val/mse_levels2"] == pytest.approx(error / taken, rel=1e-5)
    assert adversarial > clean


def test_what_rounding_undoes_is_logged_apart(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[RecoveryCallback(Nudge(), images=10)])
    run.validate(DynamicTraining(Levels()), digits(), verbose=False)
    assert run.callback_metrics["val/recovery_percent"] == 100
    assert run.callback_metrics["val/recovery_8bit_percent"] == 0


def test_the_last_epoch_is_always_measured_and_others_every_so_often(tmp_path: Path) -> None:
    recovery = RecoveryCallback(GradMDM(steps=1), images=4, every=2)
    run = trainer(tmp_path, max_epochs=5, limit_train_batches=1, callbacks=[recovery])
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits())
    assert [row["epoch"] for row in recovery.history] == [1, 3, 4]
    assert all({"val/recovery_percent", "val/accuracy", "val/flops_clean"} <= row.keys() for row in recovery.history)


def test_the_table_names_the_network_and_what_stands_before_it() -> None:
    assert title(skipnet()) == "SkipNet"
    assert title(Defended(FixedRoute(skipnet(), ["block1"]), JPEG(75))) == "SkipNet behind JPEG + FixedRoute"


def test_the_sanity_check_is_no_epoch(tmp_path: Path) -> None:
    recovery = RecoveryCallback(GradMDM(steps=1), images=4)
    run = trainer(tmp_path, num_sanity_val_steps=1, limit_train_batches=1, callbacks=[recovery])
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits())
    assert len(recovery.history) == 1


def test_measuring_does_not_change_the_training(tmp_path: Path) -> None:
    states = []
    for callbacks in ([], [RecoveryCallback(GradMDM(steps=2), images=8)]):
        task = DynamicTraining(skipnet(decision="sampled"), optimization=STEADY)
        torch.manual_seed(3)
        trainer(tmp_path, max_epochs=2, limit_train_batches=2, callbacks=callbacks).fit(task, digits())
        states.append(task.network.state_dict())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_the_epochs_of_an_interrupted_run_are_shown_too(tmp_path: Path) -> None:
    first = RecoveryCallback(GradMDM(steps=1), images=4)
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=1, callbacks=[first])
    run.fit(DynamicTraining(skipnet(), optimization=STEADY), digits())
    run.save_checkpoint(tmp_path / "x.ckpt")
    second = RecoveryCallback(GradMDM(steps=1), images=4)
    again = trainer(tmp_path, max_epochs=2, limit_train_batches=1, callbacks=[second])
    again.fit(DynamicTraining(skipnet(), optimization=STEADY), digits(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert [row["epoch"] for row in second.history] == [0, 1]
    assert second.history[0] == first.history[0]


def test_the_table_tells_the_warm_up_from_the_defence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recovery = RecoveryCallback(GradMDM(steps=1), images=4)
    task = EnergyAdversarialTraining(skipnet(), GradMDM(steps=1), optimization=STEADY, warmup_epochs=1)
    trainer(tmp_path, max_epochs=2, limit_train_batches=1, callbacks=[recovery]).fit(task, digits())
    printed = capsys.readouterr().out
    assert "1 (clean)" in printed
    assert "2 (energy-adversarial)" in printed
    for row in recovery.history:
        assert f"{row['val/recovery_percent']:.1f} %" in printed


def test_the_table_tells_the_clean_part_of_a_ramp_from_the_defence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # One batch an epoch: the first at 0 of the run, the second at a third, the last at two thirds.
    objective, attack = EnergyAdversarialObjective(ramp=(0.5, 0.8)), EnergyAttack(space=LinfBall(4 / 255), gamma=0.0, steps=1)
    recovery, settings = RecoveryCallback(GradMDM(steps=1), images=4), {"limit_train_batches": 1, "limit_val_batches": 1}
    trainer(tmp_path, max_epochs=3, callbacks=[recovery], **settings).fit(EnergyAdversarialTraining(skipnet(), attack, objective, STEADY), digits())
    printed = capsys.readouterr().out
    assert all(label in printed for label in ("1 (clean)", "2 (clean)", "3 (energy-adversarial)"))


def test_epochs_of_a_run_that_kept_no_phase_are_shown_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recovery = RecoveryCallback(GradMDM(steps=1), images=4)
    run, task = trainer(tmp_path, callbacks=[recovery], limit_train_batches=1, limit_val_batches=1), DynamicTraining(skipnet(), optimization=STEADY)
    run.fit(task, digits())
    capsys.readouterr()
    recovery.load_state_dict({"history": [{key: value for key, value in row.items() if key != "phase"} for row in recovery.history]})
    recovery.on_fit_end(run, task)
    printed = capsys.readouterr().out
    assert "of dense" in printed
    assert "clean)" not in printed


@pytest.mark.parametrize("settings", [{"images": 0}, {"every": 0}])
def test_a_count_below_1_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="images and every must be at least 1"):
        RecoveryCallback(**settings)
