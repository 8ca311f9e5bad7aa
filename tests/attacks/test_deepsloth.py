"""DeepSloth on a small network with exits, against its two schedules written a second time."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from tests import toys
from tests.attacks.test_untouched import state
from tests.toys import Logistic
from torch import Tensor, nn

from gatewatt.attacks import AutoEnergy, DeepSloth, L2Ball, LinfBall, ProjectedAttack, UniformExitsLoss, UniformHaltingLoss
from gatewatt.attacks.base import image_noise
from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, GateTable, decision_named, exit_score, gate_table


class Exits(DynamicNetwork):
    """Two stages behind two exits, and an exit at the end; images are (3, 2, 2), four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments, self.decision = {"num_classes": 4}, decision_named("hard")
        torch.manual_seed(6)
        self.stages = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
        self.exits = nn.ModuleList([nn.Linear(12, 4) for _ in range(3)])
        self.charges = (Charge("stages.0", ("exit0",)), Charge("stages.1", ("exit1",)))
        with torch.no_grad():
            for exit in self.exits:
                exit.weight.mul_(8)

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        features = images.flatten(1) - 0.5
        logits, gates, going = [self.exits[0](features)], {}, torch.ones(len(images), 1).to(images)
        threshold = torch.tensor(0.5)
        for index, (stage, exit) in enumerate(zip(self.stages, list(self.exits)[1:], strict=True)):
            score = exit_score(logits[-1], 0.6)
            decided = torch.ones_like(score) if execution == "dense" else self.decision(f"exit{index}", score, threshold, training=self.training)
            going = going * decided
            gates[f"exit{index}"] = Gate(score, threshold, going.detach())
            features = torch.tanh(stage(features))
            logits.append(exit(features))
        stacked = torch.stack(logits, 1)
        last = sum((gate.executed for gate in gates.values()), torch.zeros_like(going)).long()
        return DynamicOutput(stacked.gather(1, last[:, :, None].expand(-1, -1, 4))[:, 0], gates, stacked)


LEDGER = FlopsLedger(
    prices={"stages.0": 144.0, "stages.1": 144.0},
    charges=(Charge("stages.0", ("exit0",)), Charge("stages.1", ("exit1",))),
    dense=432.0,
    fixed=144.0,
    overhead=0.0,
    resolution=(2, 2),
    units={"exit0": 1, "exit1": 1},
)


@pytest.fixture
def network() -> Exits:
    return Exits().eval()


@pytest.fixture
def small() -> Tensor:
    drawn = torch.rand(20, 3, 2, 2, generator=torch.Generator().manual_seed(5))
    drawn[0], drawn[1] = 0.0, 1.0
    return drawn


def flops(network: DynamicNetwork, images: Tensor) -> Tensor:
    with torch.no_grad():
        return LEDGER(network(images).gates)


def cross_entropy(network: Exits, images: Tensor) -> Tensor:
    """Of the early exits, in float64 and one by one."""
    features, total = images.flatten(1) - 0.5, torch.zeros(len(images), dtype=torch.float64)
    for index in range(2):
        logits = network.exits[index](features)
        total = total - (logits - logits.exp().sum(1, keepdim=True).log()).mean(1)
        features = torch.tanh(network.stages[index](features))
    return total


def by_hand(network: Exits, images: Tensor, norm: str, steps: int, eps: float) -> Tensor:
    """Both schedules for one image after the other, in float64."""
    network = copy.deepcopy(network).double()
    found = []
    for image in images:
        clean, noise = image.double(), image_noise(image[None], 0)[0].double()
        if norm == "linf":
            x = (clean + (0.002 * (2 * noise - 1)).clamp(-eps, eps)).clamp(0, 1)
        else:
            start = 2 * noise - 1
            start = start / start.norm()
            x = (clean + start * min(1.0, eps)).clamp(0, 1)
        for step in range(steps):
            x = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(network, x[None]).sum(), x)
            if norm == "linf":
                x = (clean + (x - 0.002 * gradient.sign() - clean).clamp(-eps, eps)).clamp(0, 1)
                continue
            radius = eps * 0.9 ** ((step * 11) // steps)
            if gradient.norm() > 1:
                gradient = gradient / gradient.norm()
            delta = x.detach() - (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))) * gradient - clean
            x = (clean + delta * min(1.0, radius / float(delta.norm()))).clamp(0, 1)
        found.append(x.detach())
    return torch.stack(found)


@pytest.mark.parametrize(("norm", "steps", "eps"), [("linf", 30, 8 / 256), ("linf", 12, 0.01), ("l2", 33, 1.0), ("l2", 22, 0.4)])
def test_every_step_is_that_of_an_independent_implementation(norm: Any, steps: int, eps: float, network: Exits, small: Tensor) -> None:
    found = DeepSloth(norm, steps=steps, eps=eps)(network, small, ledger=LEDGER)
    expected = by_hand(network, small, norm, steps, eps)
    torch.testing.assert_close(found.images.double(), expected, rtol=0, atol=2e-5)
    assert found.step.tolist() == [steps] * 20


def test_the_defaults_are_the_releases() -> None:
    assert DeepSloth().settings == {"name": "DeepSloth", "norm": "linf", "target": "exits", "steps": 30, "eps": 0.03125, "seed": 0, "decision": None}
    assert DeepSloth("l2").settings == {"name": "DeepSloth", "norm": "l2", "target": "exits", "steps": 550, "eps": 1.0, "seed": 0, "decision": None}


def test_exits_become_undecided_and_images_go_on(network: Exits, small: Tensor) -> None:
    clean = flops(network, small)
    assert clean.sum() < 0.8 * 432 * 20
    for attack in (DeepSloth("linf", steps=150, eps=0.3), DeepSloth("l2", steps=110, eps=3.0)):
        found = attack(network, small, ledger=LEDGER).images
        assert bool(
            (cross_entropy(copy.deepcopy(network).double(), found.double()) <= cross_entropy(copy.deepcopy(network).double(), small.double())).all()
        )
        assert flops(network, found).sum() > clean.sum() + 0.5 * (432 * 20 - clean.sum())


@pytest.mark.parametrize(("norm", "radius"), [("linf", 8 / 256), ("l2", 0.9**10)])
def test_images_are_valid_and_in_the_last_ball(norm: Any, radius: float, network: Exits, small: Tensor) -> None:
    found = DeepSloth(norm, steps=44)(network, small, ledger=LEDGER).images
    assert bool(((found >= 0) & (found <= 1)).all())
    change = (found.double() - small.double()).flatten(1)
    assert (change.abs().max() if norm == "linf" else change.norm(dim=1).max()) <= radius + 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_batch_is_attacked_as_its_images_one_by_one(norm: Any, network: Exits, small: Tensor) -> None:
    attack = DeepSloth(norm, steps=22)
    together = attack(network, small, ledger=LEDGER).images
    for index, image in enumerate(small):
        torch.testing.assert_close(attack(network, image[None], ledger=LEDGER).images[0], together[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_network_is_as_it_was_and_the_seed_matters(norm: Any, network: Exits, small: Tensor) -> None:
    network.train()
    before = state(network)
    first = DeepSloth(norm, steps=3)(network, small, ledger=LEDGER).images
    assert state(network) == before
    assert not torch.equal(DeepSloth(norm, steps=3, seed=1)(network, small, ledger=LEDGER).images, first)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_network_without_exits_is_refused(norm: Any, small: Tensor) -> None:
    with pytest.raises(ValueError, match="DeepSloth attacks early exits, and this network returns none; use target='halting' or an attack on gates"):
        DeepSloth(norm)(Logistic().eval(), small, ledger=toys.LEDGER)


class Spoiled(Exits):
    """Infinite slopes at black."""

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        return super().forward(images.sqrt(), execution)


def test_a_nan_gradient_is_refused_and_its_image_named(small: Tensor) -> None:
    small[0], small[3] = 0.5, 0.0
    with pytest.raises(ValueError, match="image 3 of the batch met a gradient that is NaN or infinite"):
        # A step of 0.002 around black, half of it cut off: some pixel stays black.
        DeepSloth()(Spoiled().eval(), small, ledger=LEDGER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "l1"}, "norm must be linf or l2, got 'l1'"),
        ({"target": "ponder"}, "target must be exits or halting, got 'ponder'"),
        ({"steps": 0}, "steps must be at least 1 and eps finite and positive, got 0 and 0.03125"),
        ({"eps": 0.0}, "steps must be at least 1 and eps finite and positive, got 30 and 0.0"),
        ({"eps": float("inf")}, "eps finite and positive, got 30 and inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepSloth(**settings)


# ---- the substitute for networks without exits ----


def test_undecided_gates_are_on_their_thresholds() -> None:
    score = torch.rand(6, 4, dtype=torch.float64).mul(0.98).add(0.01).requires_grad_()
    level = torch.tensor([0.5, 0.5, 0.3, 0.8], dtype=torch.float64)
    table = GateTable(score, level.expand(6, 4), torch.zeros(6, 4))
    found = UniformHaltingLoss()(table, torch.ones(4))
    # Cross entropy against (1/2, 1/2) of the two-way softmax whose logits are 0 and the distance from the threshold in log-odds.
    odds = (score / (1 - score)) / (level / (1 - level))
    expected = -0.5 * ((odds / (1 + odds)).log() + (1 / (1 + odds)).log()).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), score)
    assert torch.equal(gradient > 0, score > level)
    on_it = UniformHaltingLoss()(GateTable(level.expand(6, 4), level.expand(6, 4), torch.zeros(6, 4)), torch.ones(4))
    torch.testing.assert_close(on_it, torch.full((6,), 4 * math.log(2), dtype=torch.float64))


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.2), ("l2", 2.0)])
def test_the_substitute_attacks_gates_and_says_what_it_is(norm: Any, eps: float, small: Tensor) -> None:
    attack, network = DeepSloth(norm, target="halting", steps=110, eps=eps), Logistic().eval()
    found = attack(network, small, ledger=toys.LEDGER).images
    with torch.no_grad():
        before, after = (gate_table(network(x).gates).score for x in (small, found))
    assert (after - 0.5).abs().mean() < 0.6 * (before - 0.5).abs().mean()
    assert attack.settings["name"] == attack.name == "DeepSloth-uniform-halting"
    assert repr(attack).startswith("DeepSloth-uniform-halting(")
    alone = attack(network, small[4:5], ledger=toys.LEDGER).images[0]
    torch.testing.assert_close(alone, found[4], rtol=0, atol=1e-6)


# ---- the same loss and network in the other attacks ----


@pytest.mark.parametrize("space", [LinfBall(0.1), L2Ball(0.5)], ids=["linf", "l2"])
def test_the_projected_descent_takes_the_loss_of_the_exits(space: LinfBall | L2Ball, network: Exits, small: Tensor) -> None:
    found = ProjectedAttack(UniformExitsLoss(), space=space, steps=20)(network, small, ledger=LEDGER).images
    assert flops(network, found).sum() > flops(network, small).sum()


def test_autoenergy_attacks_exits_as_the_gates_they_are(network: Exits, small: Tensor) -> None:
    sloth = DeepSloth("linf", eps=0.1, steps=60)(network, small, ledger=LEDGER).images
    assert flops(network, AutoEnergy("linf", 0.1, steps=30)(network, small, ledger=LEDGER).images).sum() >= flops(network, sloth).sum()
