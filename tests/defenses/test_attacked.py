"""Adaptive and oblivious attacks on a defended network, by the task and by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.training import QUIET, batches, digits, skipnet, trainer

from gatewatt.attacks import GradMDM
from gatewatt.callbacks import ExportCheckpoint
from gatewatt.cli import main
from gatewatt.defenses import JPEG, BudgetGuard, Defended, FixedRoute
from gatewatt.networks.checkpoint import card_of, load, save
from gatewatt.tasks import DynamicTraining, EnergyAttackEvaluation, Optimization

pytestmark = QUIET

ATTACK = GradMDM(steps=6, lr=0.05, gamma=0.0)


@pytest.mark.parametrize("oblivious", [False, True])
def test_an_attack_goes_through_the_defense_unless_it_is_oblivious(oblivious: bool, tmp_path: Path) -> None:
    def defense(network):
        return Defended(network, JPEG(40))

    task = EnergyAttackEvaluation(skipnet(), ATTACK, defense=defense, oblivious=oblivious)
    trainer(tmp_path).test(task, digits(), verbose=False)
    target = defense(skipnet().to(memory_format=torch.channels_last))
    rows = {row.id: row for row in task.rows}
    for batch in batches(digits(), "test"):
        images = batch.images.contiguous(memory_format=torch.channels_last)
        adversarial = ATTACK(target.network if oblivious else target, images, batch.labels).images
        with torch.no_grad():
            spent = task.ledger(target(adversarial, "skipped").gates).tolist()
        error = (255 * (adversarial.double() - images.double())).square().mean((1, 2, 3)).tolist()
        for index, number in enumerate(batch.ids.tolist()):
            assert rows[number].flops_adversarial == spent[index]
            assert rows[number].mse_levels2 == pytest.approx(error[index])
    described = task.describe()
    assert described["network"]["name"] == "SkipNet"
    assert described["defense"] == {"name": "JPEG", "quality": 40}
    assert described["attack"]["source"] == ("undefended" if oblivious else None)


def test_an_oblivious_attack_needs_a_defense_and_no_source() -> None:
    for settings in ({}, {"defense": lambda network: BudgetGuard(network, 0.9), "source": skipnet()}):
        with pytest.raises(ValueError, match="oblivious leaves the target's own defense out"):
            EnergyAttackEvaluation(skipnet(), oblivious=True, **settings)


@pytest.mark.parametrize("name", ["jpeg", "median", "bits", "guard"])
def test_a_fragment_puts_the_defense_before_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(skipnet(), tmp_path / "trained.safetensors", card={})
    (tmp_path / "small.yaml").write_text(
        "model: {init_args: {network: {class_path: gatewatt.networks.SkipNet, init_args: {depth: 8, width: 4, num_classes: 10}}}}\n"
        "data: {init_args: {test_images: 6}}\n"
        "trainer: {accelerator: cpu, enable_progress_bar: false, logger: false}\n"
    )
    fragments = ["task/attack", "data/digits", "attack/gradmdm", f"defense/{name}", "small.yaml"]
    flags = ["--model.attack.steps", "2", "--model.checkpoint", "trained.safetensors", "--model.oblivious", "true", "--run", name]
    assert main(["test", *(word for fragment in fragments for word in ("-c", fragment)), *flags]) == 0
    summary = json.loads((tmp_path / "runs" / name / "summary.json").read_text())
    expected = {"jpeg": "JPEG", "median": "MedianFilter", "bits": "BitDepth", "guard": "BudgetGuard"}
    assert summary["defense"]["name"] == expected[name]
    assert summary["attack"]["source"] == "undefended"
    assert summary["network"]["name"] == "SkipNet"
    if name == "guard":
        assert summary["flops_adversarial_max"] <= summary["defense"]["certificate"] <= 0.7 * summary["flops_dense"]


def test_a_static_comparator_is_trained_exported_and_attacked_like_the_others(tmp_path: Path) -> None:
    task = DynamicTraining(FixedRoute(skipnet(), ["block2"]), optimization=Optimization(lr=0.02, schedule="constant"))
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=1, callbacks=[ExportCheckpoint("static")])
    run.fit(task, digits())
    assert run.callback_metrics["val/flops_fraction"] == 1
    card = card_of(tmp_path / "static.safetensors")
    assert card["defense"] == {"name": "FixedRoute", "open_gates": ["block2"]}
    again = FixedRoute(load(tmp_path / "static.safetensors"), card["defense"]["open_gates"]).eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again(images).logits, task.network.eval()(images).logits)
    evaluation = EnergyAttackEvaluation(again, ATTACK)
    trainer(tmp_path).test(evaluation, digits(), verbose=False)
    assert all(row.flops_clean == row.flops_adversarial == row.flops_dense for row in evaluation.rows)
