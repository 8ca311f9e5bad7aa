"""The report per gate: two routes side by side, and an error where they differ."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.training import QUIET, batches, digits, skipnet, trainer

from gatewatt.attacks import GradMDM
from gatewatt.callbacks import GateReport
from gatewatt.callbacks.console import mflops, percent
from gatewatt.tasks import DynamicTraining, EnergyAttackEvaluation, Optimization

pytestmark = QUIET


def test_the_report_is_what_each_gate_did_on_the_validation_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, report = skipnet(14), GateReport()
    task = DynamicTraining(network)
    trainer(tmp_path, callbacks=[report]).validate(task, digits(), verbose=False)
    images = torch.cat([batch.images for batch in batches(digits(), "val")])
    with torch.no_grad():
        gates = network.eval()(images).gates
    *rows, always, total = report.rows
    assert [row[0] for row in rows] == list(gates)
    for (name, gate), row in zip(gates.items(), rows, strict=True):
        macs, rate = task.ledger.prices[f"trunk.blocks.{name.removeprefix('block')}.residual"], gate.executed.mean().item()
        assert row[1:] == [mflops(macs), percent(rate), mflops(rate * macs), mflops(rate * macs)]
    assert always[:2] == ["always on", mflops(task.ledger.fixed)]
    assert total[3] == mflops(task.ledger(gates).mean().item())
    printed = capsys.readouterr().out
    assert "12 clean images" in printed
    assert all(row[0] in printed for row in report.rows)


class Tampering(L.Callback):
    """Makes the hooks report one MAC too many."""

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *arguments: object) -> None:
        assert isinstance(pl_module, DynamicTraining)
        pl_module.evaluation.meter.flops["trunk.blocks.2.residual"] += 1


@pytest.mark.parametrize("verb", ["fit", "validate"])
def test_a_difference_between_the_routes_is_an_error(verb: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=1, callbacks=[Tampering(), GateReport()])
    task = DynamicTraining(skipnet(), optimization=Optimization(lr=0.01))
    with pytest.raises(RuntimeError, match=r"gate 'block2': the ledger charges [\d.]+ MACs per image, hooks saw [\d.]+ run"):
        getattr(run, verb)(task, digits())


def test_an_attack_adds_nothing_to_the_report_of_clean_images(tmp_path: Path) -> None:
    reports = [GateReport(), GateReport()]
    trainer(tmp_path, callbacks=[reports[0]]).test(DynamicTraining(skipnet()), digits(), verbose=False)
    trainer(tmp_path, callbacks=[reports[1]]).test(EnergyAttackEvaluation(skipnet(), GradMDM(steps=2)), digits(), verbose=False)
    assert reports[0].rows == reports[1].rows
    assert reports[0].title == reports[1].title
