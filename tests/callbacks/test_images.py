"""Adversarial images as files, against another reader of PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training import QUIET, digits, skipnet, trainer

from gatewatt.attacks import GradMDM
from gatewatt.callbacks import AdversarialPNGs
from gatewatt.flops import audit
from gatewatt.metrics import mse_levels2, round_to_8bit
from gatewatt.tasks import EnergyAttackEvaluation

pytestmark = QUIET


def test_files_hold_the_rounded_images_and_are_measured_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, files = skipnet(), AdversarialPNGs()
    task = EnergyAttackEvaluation(network, GradMDM(gamma=1.0, steps=5, lr=0.05))
    found = trainer(tmp_path, callbacks=[files]).predict(task, digits())
    assert found is not None
    clean, adversarial = (torch.cat(parts) for parts in zip(*((part.batch.images, part.adversarial) for part in found), strict=True))
    ids = torch.cat([part.batch.ids for part in found]).tolist()
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == sorted(f"{index:06d}.png" for index in ids)

    rounded = round_to_8bit(adversarial)
    for index, image in zip(ids, rounded, strict=True):
        with Image.open(tmp_path / "images" / f"{index:06d}.png") as file:
            assert file.mode == "RGB"
            pixels = np.asarray(file)
        np.testing.assert_array_equal(pixels, (255 * image).round().permute(1, 2, 0).numpy())

    before, floats, levels = (audit(network, images) for images in (clean, adversarial, rounded))
    room = 12 * task.ledger.dense - before
    assert files.recovery.compute().item() == pytest.approx(100 * (floats - before) / room)
    assert files.recovery_saved.compute().item() == pytest.approx(100 * (levels - before) / room)
    assert floats > before
    assert files.error_saved.compute().item() == pytest.approx(mse_levels2(clean, rounded).mean().item())
    printed = capsys.readouterr().out
    assert f"{files.recovery_saved.compute().item():.1f} %" in printed
    assert "12 images" in printed


def test_an_image_is_never_overwritten(tmp_path: Path) -> None:
    task = EnergyAttackEvaluation(skipnet(), GradMDM(steps=1))
    trainer(tmp_path, callbacks=[AdversarialPNGs()], limit_predict_batches=1).predict(task, digits())
    before = {file: file.read_bytes() for file in (tmp_path / "images").iterdir()}
    assert len(before) == 8
    with pytest.raises(FileExistsError, match=r"\.png is there already; choose another run folder"):
        trainer(tmp_path, callbacks=[AdversarialPNGs()], limit_predict_batches=1).predict(task, digits())
    assert {file: file.read_bytes() for file in (tmp_path / "images").iterdir()} == before
