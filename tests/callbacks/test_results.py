"""Result files: what they hold, and that nothing measured is ever overwritten or lost."""

from __future__ import annotations

import csv
import json
import math
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tests.training import QUIET, batches, digits, skipnet, trainer

from gatewatt.attacks import GradMDM
from gatewatt.callbacks import ResultFiles
from gatewatt.networks import checkpoint
from gatewatt.tasks import EnergyAttackEvaluation

pytestmark = QUIET

ATTACK = GradMDM(gamma=1.0, steps=5, lr=0.05)
# As DESIGN.md has them under "Fixed names".
KEYS = """network, dataset, images, attack, defense, seed, accuracy_clean, accuracy_adversarial, flops_dense, flops_clean, flops_adversarial,
flops_adversarial_p95, recovery_percent, recovery_per_image_percent, images_at_full_flops, mse_levels2, psnr_db, linf_levels,
recovery_8bit_percent, flops_adversarial_8bit, images_per_second, wall_seconds, versions, recipe"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a test of 12 images."""
    trainer(tmp_path, callbacks=[ResultFiles()]).test(EnergyAttackEvaluation(skipnet(), ATTACK), digits(), verbose=False)
    return tmp_path


def test_the_summary_is_what_the_rows_add_up_to(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert {key.strip() for key in KEYS.split(",")} <= summary.keys()
    with (run / "records.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["id"]) for row in rows] == sorted(int(index) for batch in batches(digits(), "test") for index in batch.ids)

    def column(name: str) -> list[float]:
        return [float(row[name]) for row in rows]

    clean, adversarial, rounded, dense = (column(f"flops_{name}") for name in ("clean", "adversarial", "adversarial_8bit", "dense"))
    room = sum(dense) - sum(clean)
    assert summary["images"] == 12
    assert summary["flops_dense"] == sum(dense) / 12
    assert summary["flops_clean"] == pytest.approx(sum(clean) / 12)
    assert summary["flops_adversarial"] == pytest.approx(sum(adversarial) / 12)
    assert summary["recovery_percent"] == pytest.approx(100 * (sum(adversarial) - sum(clean)) / room)
    assert summary["recovery_8bit_percent"] == pytest.approx(100 * (sum(rounded) - sum(clean)) / room)
    below = [(c, a, d) for c, a, d in zip(clean, adversarial, dense, strict=True) if c < d]
    assert summary["images_at_full_flops"] == 12 - len(below)
    assert summary["recovery_per_image_percent"] == pytest.approx(100 * sum((a - c) / (d - c) for c, a, d in below) / len(below))
    assert summary["accuracy_clean"] == sum(row["prediction_clean"] == row["label"] for row in rows) / 12
    assert summary["accuracy_adversarial"] == sum(row["prediction_adversarial"] == row["label"] for row in rows) / 12
    assert summary["mse_levels2"] == pytest.approx(sum(column("mse_levels2")) / 12)
    assert summary["psnr_db"] == pytest.approx(sum(10 * math.log10(255**2 / error) for error in column("mse_levels2")) / 12)
    assert summary["linf_levels"] == pytest.approx(sum(column("linf_levels")) / 12)
    assert summary["images_per_second"] == pytest.approx(12 / summary["wall_seconds"])


def test_the_summary_says_what_ran(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["dataset"] == "digits"
    assert summary["seed"] == 0
    assert summary["defense"] is None
    assert summary["network"] == {"name": "SkipNet", **skipnet().arguments, "checkpoint": None}
    assert {key: summary["attack"][key] for key in ATTACK.settings} == ATTACK.settings
    assert summary["versions"]["torch"] == version("torch")
    assert {"gatewatt", "lightning", "fvcore", "python"} <= summary["versions"].keys()
    assert summary["recipe"] is None


def test_a_result_is_never_overwritten_and_the_attack_not_even_begun(run: Path) -> None:
    before = {file: file.read_bytes() for file in run.iterdir()}
    task = EnergyAttackEvaluation(skipnet(2), ATTACK)
    with pytest.raises(FileExistsError, match=r"records.csv exists already and results are never overwritten: choose another run folder"):
        trainer(run, callbacks=[ResultFiles()]).test(task, digits(), verbose=False)
    assert {file: file.read_bytes() for file in run.iterdir()} == before
    assert task.rows == []


@pytest.mark.parametrize(("limit", "images"), [(1, 8), (2, 12), (0.5, 8), (1.0, 12)])
def test_a_trainer_that_is_limited_to_some_batches_records_those(limit: float, images: int, tmp_path: Path) -> None:
    task = EnergyAttackEvaluation(skipnet(), GradMDM(steps=1))
    trainer(tmp_path, limit_test_batches=limit, callbacks=[ResultFiles()]).test(task, digits(), verbose=False)
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == images


def test_a_lost_image_is_an_error(tmp_path: Path) -> None:
    class Forgetful(EnergyAttackEvaluation):
        def on_test_batch_end(self, *arguments: object) -> None:
            if len(self.rows) == 12:
                del self.rows[3]

    with pytest.raises(ValueError, match=r"11 rows for 12 images: missing \d+"):
        trainer(tmp_path, callbacks=[ResultFiles()]).test(Forgetful(skipnet(), GradMDM(steps=1)), digits(), verbose=False)
    assert list(tmp_path.iterdir()) == []


# ---- into the card ----


def test_figures_go_into_the_card_of_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    checkpoint.save(skipnet(), path, card={"license": "MIT"})
    task = EnergyAttackEvaluation(skipnet(5), ATTACK, checkpoint=str(path))
    trainer(tmp_path / "run", callbacks=[ResultFiles(into_card=True)]).test(task, digits(), verbose=False)
    summary, card = json.loads((tmp_path / "run" / "summary.json").read_text()), checkpoint.card_of(path)
    assert card["license"] == "MIT"
    assert card["measured"]["recovery_percent"] == summary["recovery_percent"]
    assert card["measured"] == {key: summary[key] for key in card["measured"]}


def test_undefined_figures_go_into_the_card_as_null(tmp_path: Path) -> None:
    network = skipnet()
    with torch.no_grad():
        network.gating.projection.bias.fill_(20.0)  # every gate open: nothing was saved, so nothing can be recovered
    checkpoint.save(network, tmp_path / "x.safetensors", card={})
    task = EnergyAttackEvaluation(network, GradMDM(steps=1), checkpoint=str(tmp_path / "x.safetensors"))
    trainer(tmp_path / "run", callbacks=[ResultFiles(into_card=True)]).test(task, digits(), verbose=False)
    assert checkpoint.card_of(tmp_path / "x.safetensors")["measured"]["recovery_percent"] is None


def test_without_a_checkpoint_there_is_no_card_and_no_attack(tmp_path: Path) -> None:
    task = EnergyAttackEvaluation(skipnet(), ATTACK)
    with pytest.raises(ValueError, match="into_card needs a checkpoint under test"):
        trainer(tmp_path, callbacks=[ResultFiles(into_card=True)]).test(task, digits(), verbose=False)
    assert task.rows == []
