"""Energy-adversarial training with every term, mix and masking on: it runs on every network, and disturbs none."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contracts.zoo import FAMILIES, sample, settled, warmed
from torch import Tensor, nn

from gatewatt.attacks import ComplexityOnly, EnergyAttack, HingeLoss, LinfBall
from gatewatt.data import Batch
from gatewatt.data.order import generator
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork, GateHook, HookedNetwork, gate_table, split_output
from gatewatt.objectives import ComputeTarget, EnergyAdversarialObjective
from gatewatt.objectives.robust import flops_gap, gate_gap
from gatewatt.tasks.defend import AttackMix, attack_from

pytestmark = pytest.mark.timeout(300)

EPS = 16 / 255
LABELS = torch.arange(12) % 10


class Gated(nn.Module):
    """Somebody else's network: two blocks of unequal cost, each behind a sigmoid of its mean features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Linear(6, 10)
        self.gates = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1), nn.Sigmoid()) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 1 + 2 * pad, padding=pad), nn.BatchNorm2d(6), nn.ReLU()) for pad in (1, 0))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for gate, block in zip(self.gates, self.blocks, strict=True):
            features = features + gate(features)[:, :, None, None] * block(features)
        return self.head(features.mean((2, 3)))


def hooked() -> DynamicNetwork:
    """With steep gates, their biases beside the median of their logits."""
    hooks = {f"gate{index}": GateHook(f"gates.{index}") for index in range(2)}
    network = HookedNetwork(Gated(), hooks, [(f"blocks.{index}", f"gate{index}") for index in range(2)], num_classes=10)
    warmed(network)
    with torch.no_grad():
        for index in range(2):
            linear = network.get_submodule(f"model.gates.{index}.2")
            assert isinstance(linear, nn.Linear)
            linear.weight *= 50
            linear.bias -= network(sample()).gates[f"gate{index}"].score.logit().median() + 0.01
        assert len(gate_table(network(sample()).gates).executed.unique(dim=0)) > 1
    return network


@pytest.fixture(scope="module", params=[*FAMILIES, "hooked"])
def network(request: pytest.FixtureRequest) -> DynamicNetwork:
    if request.param != "hooked":
        return settled(str(request.param))
    torch.manual_seed(1)
    return hooked()


@pytest.fixture(scope="module")
def ledger(network: DynamicNetwork) -> FlopsLedger:
    return price(network, sample()[:1])


@pytest.fixture(scope="module")
def adversarial(network: DynamicNetwork, ledger: FlopsLedger) -> Tensor:
    return crafted(network, ledger)


def crafted(network: DynamicNetwork, ledger: FlopsLedger) -> Tensor:
    """A batch attacked with all that the loop has to offer: aims, a random start, gradient masking."""
    attack = EnergyAttack(HingeLoss(0.5, 1.0), ComplexityOnly(), space=LinfBall(EPS), gamma=0.0, steps=3, warmup=0.0, lr=EPS / 2)
    mix, draws = AttackMix(masking=1.0), generator("mix", 1)
    varied = mix.vary(attack, 12, 0, draws)
    batch = Batch(sample(), LABELS, torch.arange(12))
    return attack_from(mix.start(LinfBall(EPS), sample(), draws), varied, network, batch, ledger)


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in [*network.named_parameters(), *network.named_buffers()]}


def test_crafting_changes_images_and_nothing_else(network: DynamicNetwork, ledger: FlopsLedger, adversarial: Tensor) -> None:
    network = copy.deepcopy(network).train()
    next(module for module in network.modules() if not list(module.children())).eval()  # a part that is frozen stays so
    before, modes, numbers = state(network), [module.training for module in network.modules()], torch.get_rng_state()
    # In the mode of training as in that of the test: crafting always meets the network that is deployed.
    assert torch.equal(crafted(network, ledger), adversarial)
    assert (adversarial - sample()).abs().max() <= EPS + 1e-6
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    assert bool((adversarial != sample()).flatten(1).any(1).all())
    after = state(network)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_steps_on_every_term_lower_their_sum(network: DynamicNetwork, ledger: FlopsLedger, adversarial: Tensor) -> None:
    network = copy.deepcopy(network).eval()
    with torch.no_grad():
        parent = network(sample()).gates
    objective = EnergyAdversarialObjective(
        ComputeTarget(0.6, diversity=1.0, spread=0.2),
        distillation=1.0,
        consistency=2.0,
        gap=4.0,
        gate_gap=0.5,
        saturation=0.5,
        limit=1.0,
        ramp=(0.1, 0.2),
    )
    objective.progress = 0.5
    optimizer = torch.optim.AdamW([parameter for parameter in network.train().parameters() if parameter.requires_grad], 3e-3)
    losses: list[float] = []
    # At first the sum may rise: untrained gates stand on their thresholds, and what is computed jumps with the first step.
    for step in range(24):
        torch.manual_seed(step)
        clean, attacked = split_output(network(torch.cat([sample(), adversarial])), [12, 12])
        terms = objective(clean, attacked, LABELS, ledger, parent)
        assert list(terms) == [
            *("cross_entropy", "compute", "diversity", "adversarial_cross_entropy", "consistency", "gap", "gate_gap", "saturation", "distillation")
        ]
        assert all(term.ndim == 0 and term.dtype == torch.float32 and bool(torch.isfinite(term)) for term in terms.values())
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        assert all(bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters() if parameter.grad is not None)
        optimizer.step()
        losses.append(sum(term.item() for term in terms.values()))
        if step > 2 and max(losses[-2:]) < losses[0]:
            return
    pytest.fail(f"no two losses in a row are below the first: {losses}")


def test_the_gaps_leave_the_clean_half_alone(network: DynamicNetwork, ledger: FlopsLedger, adversarial: Tensor) -> None:
    rounds = []
    # The attack raises some images; random pairs of images make sure that some rise in every network.
    for other in (adversarial, sample().roll(5, 0)):
        both = torch.cat([sample(), other]).requires_grad_()
        clean, attacked = split_output(network(both), [12, 12])
        for gaps in (flops_gap(clean, attacked, ledger), gate_gap(clean, attacked, ledger)):
            assert gaps.shape == (12,)
            assert bool((gaps >= 0).all())
            rounds.append(bool((gaps > 0).any()))
            (gradient,) = torch.autograd.grad(gaps.sum(), both, retain_graph=True)
            assert bool((gradient[:12] == 0).all())
            assert bool(((gradient[12:] != 0).flatten(1).any(1) == (gaps > 0)).all())
            assert bool(torch.isfinite(gradient).all())
    assert rounds[1:] == [True] * 3
