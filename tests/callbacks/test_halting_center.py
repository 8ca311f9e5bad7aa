"""The center of halting scores, found on training images when training starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.training import QUIET, digits, skipnet, trainer

from gatewatt.callbacks.halting_center import HaltingCenter
from gatewatt.networks.avit import AViT
from gatewatt.objectives.halting_prior import HaltingPrior
from gatewatt.tasks import DynamicTraining, Optimization

pytestmark = QUIET

FROZEN = Optimization(lr=1e-30, weight_decay=0.0, schedule="constant")


def avit(center: float | None = None) -> AViT:
    torch.manual_seed(4)
    return AViT("small-32", 10, patch=16, dim=12, depth=3, gate_center=center)


def test_scores_start_at_the_mean_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, data = DynamicTraining(avit(), HaltingPrior(), FROZEN), digits()
    network, calibration = task.network, HaltingCenter(0.2, images=20)
    assert isinstance(network, AViT)
    trainer(tmp_path, limit_train_batches=1, callbacks=[calibration]).fit(task, data)
    images = torch.cat([batch.images for batch, _ in zip(data.train_dataloader(), range(2), strict=False)])[:20]
    with torch.no_grad():
        scores = torch.sigmoid(network.gate_scale * network.signal(images) - network.gate_center)
    assert scores.mean().item() == pytest.approx(0.2, rel=1e-3)
    assert network.gate_center.item() == pytest.approx(calibration.center)
    assert "gate_center 30 -> " in capsys.readouterr().out
    assert network.training


def test_a_resumed_run_keeps_its_center(tmp_path: Path) -> None:
    calibration = HaltingCenter()
    calibration.load_state_dict({"center": 7.0})
    task = DynamicTraining(avit(7.0), HaltingPrior(), FROZEN)
    trainer(tmp_path, limit_train_batches=1, callbacks=[calibration]).fit(task, digits())
    assert task.network.gate_center.item() == 7.0
    assert calibration.state_dict() == {"center": 7.0}


def test_another_network_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, limit_train_batches=1, callbacks=[HaltingCenter()])
    with pytest.raises(TypeError, match="the network is a SkipNet"):
        run.fit(DynamicTraining(skipnet(), optimization=FROZEN), digits())


@pytest.mark.parametrize("arguments", [{"mean": 0.0}, {"mean": 1.0}, {"images": 0}])
def test_values_out_of_range_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"mean must be in \(0, 1\) and images at least 1"):
        HaltingCenter(**arguments)  # type: ignore[arg-type]
