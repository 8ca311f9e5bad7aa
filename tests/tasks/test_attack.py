"""The evaluation of an attack: one row per image, each figure measured a second time by other means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.toys import Levels, Nudge
from tests.training import QUIET, batches, digits, skipnet, trainer
from torch import Tensor

from gatewatt.attacks import EnergyAttack, GradMDM
from gatewatt.flops import FlopsLedger, audit, price
from gatewatt.gating import DynamicNetwork, gate_table
from gatewatt.metrics.record import ImageRecord
from gatewatt.networks import SkipNet, checkpoint
from gatewatt.tasks import EnergyAttackEvaluation

pytestmark = QUIET

ATTACK = GradMDM(gamma=1.0, steps=5, lr=0.05)


def attacked_by_hand(network: SkipNet, attack: EnergyAttack = ATTACK) -> dict[int, tuple[Tensor, Tensor, int]]:
    """Image id -> clean image, adversarial image, label; outside of any task."""
    found = {}
    for batch in batches(digits(), "test"):
        images = batch.images.contiguous(memory_format=torch.channels_last)
        for index, clean, adversarial, label in zip(batch.ids, images, attack(network, images).images, batch.labels, strict=True):
            found[int(index)] = (clean, adversarial, int(label))
    return found


def predicted(network: SkipNet, image: Tensor) -> int:
    with torch.no_grad():
        return int(network(image[None], "masked").logits.argmax())


def test_every_row_is_what_a_second_measurement_finds(tmp_path: Path) -> None:
    network = skipnet().to(memory_format=torch.channels_last)
    expected, task = attacked_by_hand(network), EnergyAttackEvaluation(network, ATTACK)
    trainer(tmp_path).test(task, digits(), verbose=False)
    assert [row.id for row in task.rows] == [int(index) for batch in batches(digits(), "test") for index in batch.ids]
    dense = price(network, torch.zeros(1, 3, 32, 32)).dense
    for row in task.rows:
        assert isinstance(row, ImageRecord)
        clean, adversarial, label = expected[row.id]
        rounded = (255 * adversarial).round() / 255
        assert row.label == label
        assert row.flops_dense == dense
        assert (row.flops_clean, row.flops_adversarial, row.flops_adversarial_8bit) == tuple(
            audit(network, image[None]) for image in (clean, adversarial, rounded)
        )
        assert (row.prediction_clean, row.prediction_adversarial, row.prediction_adversarial_8bit) == tuple(
            predicted(network, image) for image in (clean, adversarial, rounded)
        )
        error = 255 * (adversarial.double() - clean.double())
        assert row.mse_levels2 == pytest.approx(error.square().mean().item())
        assert row.linf_levels == pytest.approx(error.abs().max().item())
        assert row.mse_levels2_8bit == pytest.approx((255 * (rounded.double() - clean.double())).square().mean().item())
        with torch.no_grad():
            executed = [gate_table(network(image[None]).gates).executed[0].int().tolist() for image in (clean, adversarial)]
        assert [row.gates_clean, row.gates_adversarial] == ["".join(map(str, units)) for units in executed]
    assert sum(row.flops_adversarial for row in task.rows) > sum(row.flops_clean for row in task.rows)


def test_an_attack_that_rounding_undoes_recovers_nothing_after_rounding(tmp_path: Path) -> None:
    task = EnergyAttackEvaluation(Levels(), Nudge())
    trainer(tmp_path).test(task, digits(), verbose=False)
    assert len(task.rows) == 12
    for row in task.rows:
        assert row.flops_adversarial == row.flops_dense > row.flops_clean == row.flops_adversarial_8bit
        assert row.mse_levels2 == pytest.approx(0.4**2, rel=0.1)
        assert row.mse_levels2_8bit == pytest.approx(0, abs=1e-8)


def test_the_source_is_attacked_and_the_target_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, source = skipnet(1), skipnet(2, depth=14, gate="feedforward2")
    expected = attacked_by_hand(source.to(memory_format=torch.channels_last))
    priced: list[object] = []

    def counted(network: DynamicNetwork, image: Tensor) -> FlopsLedger:
        priced.append(network)
        return price(network, image)

    monkeypatch.setattr("gatewatt.tasks.attack.price", counted)
    task = EnergyAttackEvaluation(target, ATTACK, source=source)
    trainer(tmp_path).test(task, digits(), verbose=False)
    for row in task.rows:
        clean, adversarial, _ = expected[row.id]
        assert (row.flops_clean, row.flops_adversarial) == (audit(target, clean[None]), audit(target, adversarial[None]))
        # The source's own prices weighed its gates, else these would be other images.
        assert row.mse_levels2 == pytest.approx((255 * (adversarial.double() - clean.double())).square().mean().item())
    assert priced == [source], "two batches, one price list"
    described = task.describe()
    assert described["attack"]["source"]["gate"] == "feedforward2"
    assert described["network"]["gate"] == "recurrent"


def test_an_attack_whose_loss_holds_the_labels_runs_within_a_test(tmp_path: Path) -> None:
    # Lightning's batches are made in inference mode there, and no graph takes such a tensor.
    task = EnergyAttackEvaluation(skipnet(), EnergyAttack(steps=1, cross_entropy_weight=1.0))
    trainer(tmp_path).test(task, digits(), verbose=False)
    assert len(task.rows) == 12
    assert all(row.mse_levels2 > 0 for row in task.rows)


def test_a_test_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    network = skipnet()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    trainer(tmp_path).test(EnergyAttackEvaluation(network, ATTACK), digits(), verbose=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_second_test_forgets_the_first(tmp_path: Path) -> None:
    task, run = EnergyAttackEvaluation(skipnet(), GradMDM(steps=1)), trainer(tmp_path)
    run.test(task, digits(), verbose=False)
    rows = list(task.rows)
    run.test(task, digits(), verbose=False)
    assert task.rows == rows
    assert len(rows) == 12


def test_figures_are_taken_in_float32_whatever_the_attacks_precision(tmp_path: Path) -> None:
    network = skipnet()
    task = EnergyAttackEvaluation(network, GradMDM(steps=2))
    run = trainer(tmp_path, precision="bf16-mixed")
    found = run.predict(task, digits())
    assert found is not None
    for batch in found:
        assert batch.adversarial.dtype == torch.float32
        for image, flops in zip(batch.batch.images, batch.clean.flops, strict=True):
            assert flops == audit(network, image[None])
        for image, flops in zip(batch.adversarial, task.measure(batch.adversarial).flops, strict=True):
            assert flops == audit(network, image[None])


def test_what_is_described_is_what_ran(tmp_path: Path) -> None:
    trained = skipnet(3)
    checkpoint.save(trained, tmp_path / "trained.safetensors", card={})
    task = EnergyAttackEvaluation(skipnet(1), ATTACK, checkpoint=str(tmp_path / "trained.safetensors"))
    trainer(tmp_path, limit_test_batches=1).test(task, digits(), verbose=False)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(task.network(images).logits, trained(images).logits)
    described = task.describe()
    assert described["network"] == {"name": "SkipNet", **trained.arguments, "checkpoint": str(tmp_path / "trained.safetensors")}
    assert described["attack"] == {**ATTACK.settings, "source": None, "precision": "32-true"}


@pytest.mark.parametrize("verb", ["test", "predict"])
@pytest.mark.parametrize(("where", "what"), [("trunk.head", "logits"), ("gating.projection", "the scores of gate 'block1'")])
def test_a_network_of_nan_is_not_recorded(where: str, what: str, verb: str, tmp_path: Path) -> None:
    network = skipnet()
    with torch.no_grad():
        network.get_submodule(where).bias.fill_(torch.nan)
    task = EnergyAttackEvaluation(network, ATTACK)
    with pytest.raises(ValueError, match=f"{what} hold NaN or infinity for image 0 of the batch: nothing was recorded"):
        getattr(trainer(tmp_path), verb)(task, digits())
    assert task.rows == []


def test_a_network_with_too_few_classes_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"but the network has 5 classes \(0 to 4\); set the network's num_classes to the data's"):
        trainer(tmp_path).test(EnergyAttackEvaluation(skipnet(num_classes=5), ATTACK), digits(), verbose=False)
