"""Transfer: crafted on one family of networks, measured on another, whatever the number of gates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.zoo import FAMILIES, settled
from tests.training import QUIET, batches, digits, skipnet, trainer

from gatewatt.attacks import GradMDM, UniversalAttack
from gatewatt.flops import audit, price
from gatewatt.networks import ShallowDeep, checkpoint
from gatewatt.tasks import EnergyAttackEvaluation

pytestmark = QUIET

ATTACK = GradMDM(gamma=1.0, steps=3, lr=0.05)


@pytest.mark.parametrize("family", ["sact", "shallow-deep", "avit"])
def test_a_source_of_another_family_is_attacked_with_its_own_gates_and_prices(family: str, tmp_path: Path) -> None:
    target, source = skipnet(), settled(family)
    seen = torch.cat([batch.images for batch in batches(digits(), "test")]).contiguous(memory_format=torch.channels_last)
    units = [sum(price(network, seen[:1]).units.values()) for network in (source, target)]
    assert units[0] != units[1]
    task = EnergyAttackEvaluation(target, ATTACK, source=source)
    trainer(tmp_path).test(task, digits(), verbose=False)
    adversarial = torch.cat([ATTACK(source, part).images for part in seen.split(8)])
    for row, image in zip(task.rows, adversarial, strict=True):
        assert row.flops_adversarial == audit(target, image[None])
        assert len(row.gates_adversarial) == units[1]


def test_the_source_has_weights_of_its_own(tmp_path: Path) -> None:
    trained = settled("shallow-deep")
    assert isinstance(trained, ShallowDeep)
    checkpoint.save(trained, tmp_path / "source.safetensors", card={})
    blank = ShallowDeep(**trained.arguments)
    task = EnergyAttackEvaluation(skipnet(), ATTACK, source=blank, source_checkpoint=str(tmp_path / "source.safetensors"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(blank.state_dict()[name], tensor)
    trainer(tmp_path, limit_test_batches=1).test(task, digits(), verbose=False)
    described = task.describe()["attack"]["source"]
    assert described == {"name": "ShallowDeep", **trained.arguments, "checkpoint": str(tmp_path / "source.safetensors")}
    with pytest.raises(ValueError, match="needs a source, the network whose weights these are"):
        EnergyAttackEvaluation(skipnet(), ATTACK, source_checkpoint="sact-20-digits")


def test_a_universal_perturbation_is_fitted_to_the_source(tmp_path: Path) -> None:
    source, attack = FAMILIES["shallow-deep"](), UniversalAttack(images=8, steps=2)
    trainer(tmp_path, limit_test_batches=1).test(EnergyAttackEvaluation(skipnet(), attack, source=source), digits(), verbose=False)
    again = UniversalAttack(images=8, steps=2)
    trainer(tmp_path, limit_test_batches=1).test(EnergyAttackEvaluation(source, again), digits(), verbose=False)
    assert attack.perturbation is not None
    assert again.perturbation is not None
    torch.testing.assert_close(attack.perturbation, again.perturbation, rtol=0, atol=1e-6)
