"""Energy-adversarial training: what is crafted, what it leaves alone, and which parent is distilled."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.training import QUIET, digits, skipnet, statistics, trainer
from torch import Tensor
from torch.nn import functional

from gatewatt.attacks import AttackResult, GradMDM
from gatewatt.defenses import BitDepth, BudgetGuard, Defended, bare
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, split_output
from gatewatt.networks import checkpoint
from gatewatt.networks.skipnet import RecurrentGates
from gatewatt.objectives import ComputeTarget, EnergyAdversarialObjective
from gatewatt.tasks import EnergyAdversarialTraining, Optimization

pytestmark = QUIET

STEADY = Optimization(lr=0.02, schedule="constant")


class Remembering(GradMDM):
    """The attack in the loop, and all that went in and came out."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.modes: list[bool] = []

    def __call__(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None = None, *, ledger: FlopsLedger | None = None) -> AttackResult:
        result = super().__call__(network, images, labels, ledger=ledger)
        self.calls.append((images.clone(), result.images.clone()))
        self.modes.append(network.training)
        return result


class States(L.Callback):
    """The network's and the parent's state at the end of each epoch."""

    def __init__(self) -> None:
        self.network: list[dict[str, Tensor]] = []
        self.parent: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, EnergyAdversarialTraining)
        self.network.append(copied(pl_module.network))
        self.parent.append(copied(pl_module.parent))


def copied(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_one_step_is_one_forward_over_clean_and_adversarial_images(tmp_path: Path) -> None:
    attack = Remembering(steps=3, lr=0.03, warmup=0.0)
    task = EnergyAdversarialTraining(skipnet(), attack, optimization=STEADY)
    twin, parent = copy.deepcopy(task.network).train(), copy.deepcopy(task.network).eval()
    before = statistics(task.network)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(task, digits())

    ((clean, adversarial),) = attack.calls
    assert not torch.equal(clean, adversarial)
    output = twin(torch.cat([clean, adversarial]).contiguous(memory_format=torch.channels_last))
    # Crafting ran the network several times; the statistics have seen this one pass.
    after = statistics(task.network)
    for name, tensor in statistics(twin).items():
        assert torch.equal(after[name], tensor)
        assert not torch.equal(after[name], before[name])
    assert attack.modes == [True]

    labels = next(iter(digits().train_dataloader())).labels
    logged = {name.removeprefix("train/"): value.item() for name, value in run.callback_metrics.items()}
    assert logged.keys() == {"cross_entropy", "adversarial_cross_entropy", "distillation"}
    assert logged["cross_entropy"] == pytest.approx(functional.cross_entropy(output.logits[:16], labels).item(), rel=1e-5)
    assert logged["adversarial_cross_entropy"] == pytest.approx(functional.cross_entropy(output.logits[16:], labels).item(), rel=1e-5)
    with torch.no_grad():
        decided = [(gate.score >= 0.5).float() for gate in parent(clean).gates.values()]
    shares = [macs / sum(task.ledger.prices.values()) for macs in task.ledger.prices.values()]
    wanted = torch.zeros(())
    for share, gate, asked in zip(shares, output.gates.values(), decided, strict=True):
        wanted = wanted + share * sum(functional.binary_cross_entropy(score, asked) for score in gate.score.split(16))
    assert logged["distillation"] == pytest.approx(2 * float(wanted.detach()), rel=1e-4)


def test_crafting_leaves_no_gradient_in_the_network(tmp_path: Path) -> None:
    class Gradients(L.Callback):
        def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
            assert all(parameter.grad is None for parameter in pl_module.parameters())
            assert all(parameter.requires_grad for parameter in pl_module.network.parameters())
            assert not any(parameter.requires_grad for parameter in pl_module.parent.parameters())

    task = EnergyAdversarialTraining(skipnet(), GradMDM(steps=1), optimization=STEADY)
    trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[Gradients()]).fit(task, digits())


def test_the_parent_is_the_network_at_the_end_of_the_warm_up(tmp_path: Path) -> None:
    attack, states = Remembering(steps=1), States()
    task = EnergyAdversarialTraining(skipnet(), attack, optimization=STEADY, warmup_epochs=2)
    started = copied(task.network)
    trainer(tmp_path, max_epochs=4, limit_train_batches=2, limit_val_batches=0, callbacks=[states]).fit(task, digits())
    # The warm-up trains on clean images.
    assert len(attack.calls) == 2 * 2
    assert [same(parent, started) for parent in states.parent] == [True, True, False, False]
    assert same(states.parent[2], states.network[1])
    assert same(states.parent[3], states.network[1])
    assert not same(states.network[2], states.network[1])
    assert not task.parent.training


def test_without_a_warm_up_the_parent_is_the_network_as_it_starts(tmp_path: Path) -> None:
    task = EnergyAdversarialTraining(skipnet(), GradMDM(steps=1), optimization=STEADY)
    started = copied(task.network)
    trainer(tmp_path, max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(task, digits())
    assert same(copied(task.parent), started)
    assert not same(copied(task.network), started)


def test_a_resumed_run_distils_the_same_parent(tmp_path: Path) -> None:
    def task(seed: int) -> EnergyAdversarialTraining:
        return EnergyAdversarialTraining(skipnet(seed), GradMDM(steps=1), optimization=STEADY, warmup_epochs=1)

    whole, broken, resumed = task(1), task(1), task(5)
    settings = {"limit_train_batches": 2, "limit_val_batches": 0}
    states = States()
    trainer(tmp_path, max_epochs=3, callbacks=[states], **settings).fit(whole, digits())
    first = trainer(tmp_path, max_epochs=2, **settings)
    first.fit(broken, digits())
    first.save_checkpoint(tmp_path / "x.ckpt")
    trainer(tmp_path, max_epochs=3, **settings).fit(resumed, digits(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert same(copied(resumed.parent), states.network[0])
    assert bool(resumed.parent_taken)
    # And so ends where the run that was never interrupted ends.
    assert same(copied(resumed.network), copied(whole.network))


def test_the_parent_is_not_optimised(tmp_path: Path) -> None:
    task = EnergyAdversarialTraining(skipnet(), GradMDM(steps=1), optimization=STEADY)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(task, digits())
    optimised = [parameter for group in run.optimizers[0].param_groups for parameter in group["params"]]
    assert len(optimised) == len(list(task.network.parameters()))
    assert {id(parameter) for parameter in optimised} == {id(parameter) for parameter in task.network.parameters()}


def test_training_starts_from_a_checkpoint(tmp_path: Path) -> None:
    trained = skipnet(7)
    checkpoint.save(trained, tmp_path / "trained.safetensors", card={})
    task = EnergyAdversarialTraining(skipnet(1), checkpoint=str(tmp_path / "trained.safetensors"))
    assert same(copied(task.network), copied(trained))
    assert same(copied(task.parent), copied(trained))


def test_attack_training_and_parent_are_behind_the_defense(tmp_path: Path) -> None:
    trained, attack = skipnet(7), Remembering(steps=2, lr=0.03, warmup=0.0)
    checkpoint.save(trained, tmp_path / "trained.safetensors", card={})
    task = EnergyAdversarialTraining(
        skipnet(1),
        attack,
        optimization=STEADY,
        defense=lambda network: Defended(network, BitDepth(1)),
        checkpoint=str(tmp_path / "trained.safetensors"),
    )
    assert same(copied(bare(task.network)), copied(trained))
    twin = Defended(copy.deepcopy(trained), BitDepth(1))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(task, digits())

    ((clean, adversarial),) = attack.calls
    crafted = GradMDM(steps=2, lr=0.03, warmup=0.0)(twin.to(memory_format=torch.channels_last), clean).images
    torch.testing.assert_close(adversarial, crafted)
    assert not torch.equal(crafted, GradMDM(steps=2, lr=0.03, warmup=0.0)(trained, clean).images)
    assert isinstance(task.parent, Defended)
    both, labels = torch.cat([clean, adversarial]), next(iter(digits().train_dataloader())).labels
    expected = [functional.cross_entropy(network.train()(both).logits[:16], labels).item() for network in (twin, copy.deepcopy(trained))]
    assert run.callback_metrics["train/cross_entropy"].item() == pytest.approx(expected[0], rel=1e-5)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_a_parent_behind_a_guard_of_its_own_teaches_what_that_lets_through(tmp_path: Path) -> None:
    network = skipnet(7)
    assert isinstance(network.gating, RecurrentGates)
    with torch.no_grad():
        network.gating.projection.bias += 5.0  # asks for everything
    objective = EnergyAdversarialObjective(distillation=1.0, distilled="executed")
    attack = Remembering(steps=1, lr=0.03, warmup=0.0)
    task = EnergyAdversarialTraining(
        network,
        attack,
        objective,
        STEADY,
        defense=lambda network: BudgetGuard(network, 0.6, size=digits().size),
        parent_defense=lambda network: BudgetGuard(network, 0.8, size=digits().size),
    )
    assert isinstance(task.parent, BudgetGuard)
    assert (task.network.budget, task.parent.budget) == (0.6, 0.8)
    assert bare(task.parent) is not bare(task.network)
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    twin, parent = copy.deepcopy(task.network).train(), copy.deepcopy(task.parent).eval()
    run.fit(task, digits())
    ((clean, adversarial),) = attack.calls
    assert same(copied(task.parent), copied(parent))
    halves = split_output(twin(torch.cat([clean, adversarial]).contiguous(memory_format=torch.channels_last)), [len(clean)] * 2)
    labels = next(iter(digits().train_dataloader())).labels
    decided = [behind(clean).gates for behind in (parent, copy.deepcopy(twin).eval())]
    terms = [objective(*halves, labels, task.ledger, gates)["distillation"].item() for gates in decided]
    assert run.callback_metrics["train/distillation"].item() == pytest.approx(terms[0], rel=1e-4)
    assert terms[0] != pytest.approx(terms[1], rel=1e-2)


def test_it_trains_in_bfloat16_with_a_target_for_the_clean_half(tmp_path: Path) -> None:
    objective = EnergyAdversarialObjective(ComputeTarget(0.7))
    task = EnergyAdversarialTraining(skipnet(), GradMDM(steps=2, warmup=0.0), objective, STEADY)
    run = trainer(tmp_path, limit_train_batches=2, precision="bf16-mixed", limit_val_batches=1)
    run.fit(task, digits())
    assert {"train/compute", "train/distillation", "val/accuracy", "val/flops_clean"} <= run.callback_metrics.keys()
    assert all(torch.isfinite(value) for value in run.callback_metrics.values())


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_epochs must be at least 0, got -1"):
        EnergyAdversarialTraining(skipnet(), warmup_epochs=-1)
