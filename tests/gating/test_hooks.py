"""Somebody else's gated networks, their code untouched, against the same computation written out."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.training import QUIET, batches, digits, trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import ResNet as TorchvisionResNet
from torchvision.transforms import Normalize

from gatewatt.attacks import EnergyAttack, GradMDM
from gatewatt.attacks.losses import PowerLoss
from gatewatt.callbacks import GateReport, RecoveryCallback, ResultFiles
from gatewatt.flops import audit, compare_routes, price, random_patterns
from gatewatt.gating import Charge, GateTable, check_finite, forced, gate_table, measuring_execution, straight_through
from gatewatt.gating.gate_hook import GateHook
from gatewatt.gating.hooks import HookedNetwork
from gatewatt.networks import ResNet, SkipNet
from gatewatt.networks.layers import global_average
from gatewatt.networks.skipnet import FeedForwardGates, RecurrentGates, run_masked, run_skipped
from gatewatt.objectives import ComputeTarget, EnergyAdversarialObjective
from gatewatt.tasks import EnergyAdversarialTraining, EnergyAttackEvaluation, Optimization

pytestmark = QUIET

# ---- models as people write them ----


class Colour(nn.Module):
    """A linear function of the mean colour, around the middle grey, (B, outputs)."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(3, outputs)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features.mean((2, 3)) - 0.5)


class MaskAndLogProbability(nn.Module):
    """Returns (mask, log-probabilities): soft in training, rounded otherwise, as SkipNet's feed-forward gates."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = Colour(2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        logs = self.colour(features).log_softmax(1)
        mask = logs[:, 1].exp().view(-1, 1, 1, 1)
        return mask if self.training else (mask > 0.5).float(), logs


class MaskAndProbability(nn.Module):
    """Returns (straight-through mask, probability), as SkipNet's recurrent gate."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = Colour()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.colour(features).sigmoid()
        mask = (probability > 0.5).float().detach() - probability.detach() + probability
        return mask.view(-1, 1, 1, 1), probability


class GumbelSampler(nn.Module):
    """One-hot decisions (B, 2): the larger logit, with noise in training."""

    def forward(self, logits: Tensor) -> Tensor:
        if self.training:
            return functional.gumbel_softmax(logits, hard=True)
        larger = (logits[:, 1:] > logits[:, :1]).to(logits)
        return torch.cat([1 - larger, larger], dim=1)


class Gumbel(nn.Module):
    """Logits, then a hard decision of them, as ConvNet-AIG's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.sampler = Colour(2), GumbelSampler()

    def forward(self, features: Tensor) -> Tensor:
        return self.sampler(self.logits(features))


class Answer(NamedTuple):
    """A gate's answer with a name for each part."""

    extra: str
    keep: Tensor


class Answering(nn.Module):
    """Returns a named tuple or a mapping."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.colour, self.kind = Colour(), kind

    def forward(self, features: Tensor) -> Any:
        keep = self.colour(features).sigmoid()
        return Answer("", keep) if self.kind is Answer else {"extra": "", "keep": keep}


class Blocks(nn.Module):
    """``x + keep(gate(x)) block(x)``, twice, and a linear head."""

    def __init__(self, make_gate: Callable[[], nn.Module], keep: Callable[[Any], Tensor], units: Callable[[int], int] = lambda side: 1) -> None:
        super().__init__()
        self.gates = nn.ModuleList([make_gate() for _ in range(2)])
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)])
        self.head, self.keep, self.units = nn.Linear(3, 4), keep, units

    def forward(self, images: Tensor) -> Tensor:
        features = images
        for gate, block in zip(self.gates, self.blocks, strict=True):
            features = features + self.keep(gate(features)) * block(features)
        return self.head(features.mean((2, 3)))

    def written_out(self, images: Tensor, decisions: Mapping[str, Tensor]) -> Tensor:
        """The same without gate modules."""
        features = images
        for index, block in enumerate(self.blocks):
            units = decisions[f"gate{index}"]
            mask = units.view(-1, 1, *images.shape[2:]) if units.shape[1] > 1 else units.view(-1, 1, 1, 1)
            features = features + mask * block(features)
        return self.head(features.mean((2, 3)))


class Kind(NamedTuple):
    """A way of writing gates, and the hook for the gate at a path."""

    gate: Callable[[], nn.Module]
    keep: Callable[[Any], Tensor]
    hook: Callable[[str], GateHook]
    units: Callable[[int], int] = lambda side: 1


def as_map(values: Tensor) -> Tensor:
    return values.view(len(values), 1, 1, 1)


KINDS = {
    "probability": Kind(lambda: nn.Sequential(Colour(), nn.Sigmoid()), lambda p: as_map((p > 0.5).float()), lambda path: GateHook(path)),
    "soft probability": Kind(lambda: nn.Sequential(Colour(), nn.Sigmoid()), as_map, lambda path: GateHook(path)),
    "other threshold": Kind(
        lambda: nn.Sequential(Colour(), nn.Sigmoid()), lambda p: as_map((p > 0.7).float()), lambda path: GateHook(path, threshold=0.7)
    ),
    "no unit axis": Kind(
        lambda: nn.Sequential(Colour(), nn.Flatten(0), nn.Sigmoid()), lambda p: as_map((p > 0.5).float()), lambda path: GateHook(path)
    ),
    "logit": Kind(Colour, lambda logit: as_map((logit > 0).float()), lambda path: GateHook(path, score="logit")),
    "soft logit": Kind(
        Colour, lambda logit: as_map(logit.sigmoid()), lambda path: GateHook(path, score="logit", write=lambda logit, keep: 400 * keep - 200)
    ),
    "two classes": Kind(lambda: Colour(2), lambda pair: as_map(pair.argmax(1).float()), lambda path: GateHook(path, score="softmax2")),
    "mask, log": Kind(MaskAndLogProbability, lambda pair: pair[0], lambda path: GateHook(path, score="softmax2", select=1, into=0)),
    "mask, probability": Kind(MaskAndProbability, lambda pair: pair[0], lambda path: GateHook(path, select=1, into=0)),
    "Gumbel": Kind(
        Gumbel,
        lambda pair: as_map(pair[:, 1]),
        lambda path: GateHook(f"{path}.logits", score="softmax2", at=f"{path}.sampler", write="onehot"),
    ),
    "named tuple": Kind(lambda: Answering(Answer), lambda answer: as_map(answer.keep), lambda path: GateHook(path, select="keep")),
    "mapping": Kind(lambda: Answering(dict), lambda answer: as_map(answer["keep"]), lambda path: GateHook(path, select="keep")),
    "positions": Kind(
        lambda: nn.Conv2d(3, 1, 1), lambda logit: (logit > 0).float(), lambda path: GateHook(path, score="logit"), lambda side: side * side
    ),
    "positions, two classes": Kind(
        lambda: nn.Conv2d(3, 2, 1),
        lambda pair: pair.argmax(1, keepdim=True).float(),
        lambda path: GateHook(path, score="softmax2"),
        lambda side: side * side,
    ),
    "own score": Kind(
        lambda: nn.Sequential(Colour(), nn.Tanh()),
        lambda value: as_map((value > 0).float()),
        lambda path: GateHook(path, score=lambda value: (value + 1) / 2, write=lambda value, keep: 2 * keep - 1),
    ),
}


def sharpen(model: nn.Module) -> None:
    """Gates that tell images apart: steep, and indifferent to the middle grey."""
    for name, layer in model.named_modules():
        if name.startswith("gate") and isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(layer.weight, std=8.0)
            nn.init.normal_(layer.bias, std=0.1)


def hooked(kind: str, **settings: Any) -> HookedNetwork:
    torch.manual_seed(3)
    make_gate, keep, hook, units = KINDS[kind]
    model = Blocks(make_gate, keep, units)
    sharpen(model)
    gates = {f"gate{index}": hook(f"gates.{index}") for index in range(2)}
    charges = [(f"blocks.{index}", f"gate{index}") for index in range(2)]
    return HookedNetwork(model, gates, charges, num_classes=4, **settings).eval()


@pytest.fixture
def small(images: Tensor) -> Tensor:
    return images[:, :, :8, :8].contiguous()


# ---- every way of writing gates ----


@pytest.mark.parametrize("kind", KINDS)
def test_own_forced_and_dense_decisions_do_what_the_computation_written_out_does(kind: str, small: Tensor) -> None:
    network = hooked(kind)
    model = network.model
    assert isinstance(model, Blocks)
    ones = {f"gate{index}": torch.ones(7, model.units(8)) for index in range(2)}
    with torch.no_grad():
        plain, own, dense = model(small), network(small), network(small, "dense")
        if not kind.startswith(("soft", "named tuple", "mapping")):
            torch.testing.assert_close(own.logits, plain)
        assert 0 < gate_table(own.gates).executed.mean() < 1
        for name, gate in own.gates.items():
            assert gate.score.shape == gate.executed.shape == (7, model.units(8))
            assert gate.threshold.item() == pytest.approx(0.7 if kind == "other threshold" else 0.5)
            assert torch.equal(gate.executed, gate.open.float()), name
        torch.testing.assert_close(own.logits, model.written_out(small, {name: gate.executed for name, gate in own.gates.items()}))
        torch.testing.assert_close(dense.logits, model.written_out(small, ones))
        for pattern in random_patterns(network, small, 4):
            with forced(network, pattern):
                output = network(small)
            assert all(torch.equal(gate.executed, pattern[name]) for name, gate in output.gates.items())
            torch.testing.assert_close(output.logits, model.written_out(small, pattern))


@pytest.mark.parametrize("kind", KINDS)
def test_prices_are_those_of_the_blocks_and_gates_score_with_a_gradient(kind: str, small: Tensor) -> None:
    network = hooked(kind)
    ledger = price(network, small[:1])
    block = 3 * 3 * 9 * 64
    assert dict(ledger.prices) == {"model.blocks.0": block, "model.blocks.1": block}
    assert ledger.dense == ledger.fixed + 2 * block
    assert ledger.fixed == ledger.overhead + 12
    pixels = small.clone().requires_grad_()
    output = network(pixels)
    assert torch.equal(ledger(output.gates), ledger.fixed + block * torch.stack([gate.executed.mean(1) for gate in output.gates.values()]).sum(0))
    for gate in output.gates.values():
        (gradient,) = torch.autograd.grad(gate.score.sum(), pixels, retain_graph=True)
        assert bool((gradient.flatten(1).norm(dim=1) > 0).all())


@pytest.mark.parametrize("kind", ["mask, log", "Gumbel", "soft probability"])
def test_what_is_executed_in_training_is_what_the_network_decided(kind: str, small: Tensor) -> None:
    network = hooked(kind, decision="sampled").train()
    output = network(small)
    assert isinstance(network.model, Blocks)
    torch.testing.assert_close(output.logits, network.model.written_out(small, {name: gate.executed for name, gate in output.gates.items()}))


@pytest.mark.parametrize("kind", ["soft probability", "mask, log", "mask, probability", "Gumbel", "mapping"])
def test_a_straight_through_decision_trains_the_gate(kind: str, small: Tensor) -> None:
    network = hooked(kind)
    network(small).logits.square().sum().backward()
    weights = [parameter for name, parameter in network.named_parameters() if ".gates." in name]
    assert all(weight.grad is not None and bool(weight.grad.abs().sum() > 0) for weight in weights)


def test_an_attack_opens_gates(small: Tensor) -> None:
    for kind in ("logit", "Gumbel", "positions"):
        network = hooked(kind)
        ledger = price(network, small[:1])
        adversarial = GradMDM(gamma=1.0, steps=30, lr=0.05)(network, small).images
        clean, attacked = ledger(network(small).gates), ledger(network(adversarial).gates)
        assert attacked.mean() > clean.mean() + 0.2 * (ledger.dense - clean.mean())


# ---- SkipNet, written by somebody else ----


class Theirs(nn.Module):
    """A residual network with SkipNet's gates that knows nothing of this package's gates."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.trunk = ResNet(14, width=4)
        channels = [block.outputs for block in self.trunk.blocks][:-1]
        self.gating = RecurrentGates(channels, False) if recurrent else FeedForwardGates(channels, "feedforward2")
        self.runs = 0

    def forward(self, images: Tensor, run: Callable[..., Tensor] = run_masked) -> Tensor:
        first, *others = self.trunk.blocks
        features, state = first(self.trunk.stem(images)), None
        for index, block in enumerate(others):
            mask, state = self.gating(features, index, state)
            features = run(block, features, mask)
        return self.trunk.head(global_average(features))

    def skipping(self, images: Tensor) -> Tensor:
        return self(images, run_skipped)


def pair(recurrent: bool) -> tuple[SkipNet, HookedNetwork]:
    """Our SkipNet, and theirs with the same weights."""
    ours = SkipNet(14, width=4, gate="recurrent" if recurrent else "feedforward2")
    with torch.no_grad():
        for parameter in ours.gating.parameters():
            parameter *= 3
    theirs = Theirs(recurrent)
    theirs.load_state_dict(ours.state_dict())
    # One module for all gates, which hands on its state; or one for each.
    hooks = {"gate": GateHook("gating", select=0, fires=5)} if recurrent else {f"gate.{i}": GateHook(f"gating.gates.{i}") for i in range(5)}
    charges = [Charge(f"trunk.blocks.{index}.residual", (f"gate.{index - 1}",)) for index in range(1, 6)]
    normalize = copy.deepcopy(ours.trunk.normalize)
    overhead = None if recurrent else ["gating"]
    network = HookedNetwork(theirs, hooks, charges, num_classes=10, normalize=normalize, overhead=overhead, skipped="skipping")
    return ours.eval(), network.eval()


@pytest.mark.parametrize("recurrent", [True, False])
def test_skipnet_hooked_has_the_ledger_and_the_gradients_of_skipnet(recurrent: bool, images: Tensor) -> None:
    ours, theirs = pair(recurrent)
    images = images[:3, :, :16, :16].contiguous()
    ledgers = [price(network, images[:1]) for network in (ours, theirs)]
    for first, second in zip(*([list(ledger.prices.values()), [ledger.dense, ledger.fixed, ledger.overhead]] for ledger in ledgers), strict=True):
        assert first == second
    gradients = []
    for network, ledger in zip((ours, theirs), ledgers, strict=True):
        pixels = images.clone().requires_grad_()
        output = network.train()(pixels)
        loss = functional.cross_entropy(output.logits, torch.tensor([1, 2, 3])) + gate_table(output.gates).score.square().sum()
        parameters = list(network.parameters())
        gradients.append([ledger(output.gates), ledger.weights(output.gates), *torch.autograd.grad(loss, [pixels, *parameters], allow_unused=True)])
    assert len(gradients[0]) == len(gradients[1])
    # The last block's gate of the feed-forward kind does not exist; every other tensor has a gradient, and the same one.
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
    attacked = [GradMDM(steps=2, warmup=0.5)(network.eval(), images).images for network in (ours, theirs)]
    torch.testing.assert_close(*attacked)


@pytest.mark.parametrize("recurrent", [True, False])
def test_four_routes_agree_where_a_skipping_forward_is_given(recurrent: bool, images: Tensor) -> None:
    network = pair(recurrent)[1]
    images = images[:, :, :16, :16].contiguous()
    ledger = price(network, images[:1])
    assert measuring_execution(network) == "skipped"
    for batch, count in [(1, 3), (3, 3)]:
        assert compare_routes(network, images[:batch], ledger).agree
        for pattern in random_patterns(network, images[:batch], count, seed=batch):
            assert compare_routes(network, images[:batch], ledger, pattern).agree


# ---- torchvision, subclassed ----


class GatedBlock(BasicBlock):
    """torchvision's block; a sigmoid decides whether the residual counts."""

    def __init__(self, inplanes: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(inplanes, *arguments, **settings)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inplanes, 1))

    def forward(self, x: Tensor) -> Tensor:
        keep = (self.gate(x).sigmoid() > 0.5)[:, :, None, None]
        residual = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(keep * residual + (x if self.downsample is None else self.downsample(x)))


class GatedResNet18(TorchvisionResNet):
    """ResNet-18 with a gate in every block."""

    def __init__(self) -> None:
        super().__init__(GatedBlock, [2, 2, 2, 2], num_classes=10)


def gated_resnet18(images: Tensor) -> HookedNetwork:
    """With gates that are just closed for these images."""
    model = GatedResNet18()
    paths = [f"layer{group}.{block}" for group in range(1, 5) for block in range(2)]
    network = HookedNetwork(
        model,
        {path: GateHook(f"{path}.gate", score="logit") for path in paths},
        [(f"{path}.{layer}", path) for path in paths for layer in ("conv1", "conv2")],
        num_classes=10,
        normalize=Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ).eval()
    with torch.no_grad():
        for path in paths:
            linear = model.get_submodule(f"{path}.gate.2")
            linear.weight *= 8
            linear.bias -= network(images).gates[path].score.logit().max() + 0.02
    return network


def test_torchvisions_resnet18_with_gates_is_priced_and_attacked(images: Tensor) -> None:
    images = images[3:5]
    network = gated_resnet18(images)
    ledger = price(network, images[:1])
    plain, gates = TorchvisionResNet(BasicBlock, [2, 2, 2, 2], num_classes=10).eval(), sum([64, 64, 64, 128, 128, 256, 256, 512])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        plain(images[:1])
    assert ledger.dense == counter.get_total_flops() / 2 + gates
    assert ledger.overhead == gates
    assert len(ledger.prices) == 16
    clean = ledger(network(images).gates)
    assert clean.tolist() == [ledger.fixed] * 2
    adversarial = GradMDM(gamma=1.0, steps=6, lr=0.02)(network, images).images
    attacked = ledger(network(adversarial).gates)
    assert bool((attacked > clean + 0.2 * (ledger.dense - clean)).all())
    # The model alone, as its author runs it, does the same.
    torch.testing.assert_close(network(adversarial).logits, network.model(network.normalize(adversarial)))


# ---- early exits ----


class Exits(nn.Module):
    """Three stages with a classifier each; all answers, or really early."""

    def __init__(self, confidence: float = 0.6) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(3, 4) for _ in range(3)])
        self.confidence = confidence
        for head in self.heads:
            nn.init.normal_(head.weight, std=2.0)

    def forward(self, images: Tensor) -> list[Tensor]:
        answers, features = [], images
        for stage, head in zip(self.stages, self.heads, strict=True):
            features = stage(features).relu()
            answers.append(head(features.mean((2, 3))))
        return answers

    def early(self, images: Tensor) -> Tensor:
        rows, features, answers = torch.arange(len(images)), images, images.new_zeros(len(images), 4)
        for stage, head in zip(self.stages, self.heads, strict=True):
            features = stage(features).relu()
            logits = head(features.mean((2, 3)))
            answers = answers.index_copy(0, rows, logits)
            unsure = logits.softmax(1).max(1).values <= self.confidence
            rows, features = rows[unsure], features[unsure]
            if len(rows) == 0:
                break
        return answers


def with_exits(kind: type[Exits] = Exits, confidence: float = 0.6, **settings: Any) -> HookedNetwork:
    torch.manual_seed(9)
    return HookedNetwork(
        kind(confidence),
        {f"exit{index}": GateHook(f"heads.{index}", score="confidence", threshold=0.6) for index in range(2)},
        [(f"{kind}.{index}", f"exit{index - 1}") for index in (1, 2) for kind in ("stages", "heads")],
        num_classes=4,
        **{"logits": lambda answers: answers[-1] if isinstance(answers, list) else answers, "skipped": "early", **settings},
    ).eval()


def test_an_image_answers_at_its_first_confident_exit(small: Tensor) -> None:
    network = with_exits()
    answers = network.model(small)
    output = network(small)
    assert output.exits is not None
    torch.testing.assert_close(output.exits, torch.stack(answers, dim=1))
    taken = set()
    for image in range(7):
        confident = [index for index in range(2) if answers[index][image].softmax(0).max() > 0.6]
        exit_taken = confident[0] if confident else 2
        taken.add(exit_taken)
        torch.testing.assert_close(output.logits[image], answers[exit_taken][image])
        assert [gate.executed[image].item() for gate in output.gates.values()] == [float(exit_taken > 0), float(exit_taken > 1)]
    assert taken == {0, 1, 2}
    torch.testing.assert_close(network(small, "dense").logits, answers[-1])


def test_an_image_that_left_does_not_come_back(small: Tensor) -> None:
    network = with_exits()
    answers = network.model(small)
    pattern = {"exit0": torch.tensor([[0.0], [0], [1], [1], [0], [1], [1]]), "exit1": torch.tensor([[1.0], [0], [0], [1], [1], [1], [0]])}
    with forced(network, pattern):
        output = network(small)
        with pytest.raises(ValueError, match="gate 'exit0' decides by itself: forced and sampled decisions need"):
            network(small, "skipped")
    assert output.gates["exit1"].executed.flatten().tolist() == [0, 0, 0, 1, 0, 1, 0]
    torch.testing.assert_close(output.logits, torch.stack([answers[e][i] for i, e in enumerate([0, 0, 1, 2, 0, 2, 1])]))


def test_four_routes_agree_on_real_exits(small: Tensor) -> None:
    network = with_exits()
    ledger = price(network, small[:1])
    assert ledger.overhead == 12
    for batch in (small, *small.split(1), small[:2], small.flip(0)):
        routes = compare_routes(network, batch, ledger)
        assert routes.agree, routes
    output = network(small, "skipped")
    check_finite(output)
    assert output.exits is None
    assert audit(network, small) < 7 * ledger.dense


def test_exits_are_attacked(small: Tensor) -> None:
    network = with_exits()
    ledger = price(network, small[:1])
    adversarial = GradMDM(gamma=0.1, steps=20, lr=0.05)(network, small).images
    assert ledger(network(adversarial, "skipped").gates).mean() > ledger(network(small, "skipped").gates).mean()


def test_the_gradient_of_every_exit_counts_once(small: Tensor) -> None:
    pixels = small.clone().requires_grad_()
    output = with_exits()(pixels)
    assert output.exits is not None
    first, second, last = output.exits.unbind(1)
    on = [straight_through(name, gate.score, gate.threshold, training=False) for name, gate in output.gates.items()]
    expected = (1 - on[0]) * first + on[0] * ((1 - on[1]) * second + on[1] * last)
    torch.testing.assert_close(output.logits, expected)
    found, wanted = (torch.autograd.grad(logits.square().sum(), pixels, retain_graph=True)[0] for logits in (output.logits, expected))
    torch.testing.assert_close(found, wanted)


class Hasty(Exits):
    """Leaves early in any pass."""

    def forward(self, images: Tensor) -> Any:
        return self.early(images)


def test_a_model_that_leaves_early_by_itself_is_noticed(small: Tensor) -> None:
    network = with_exits(Hasty, confidence=0.0)
    with pytest.raises(ValueError, match=r"gate 'exit1' did not fire: module 'heads.1' was called 0 time.*let it run all of them"):
        network(small)


def test_a_written_exit_keeps_a_hasty_model_going(small: Tensor) -> None:
    network = with_exits(Hasty)
    stay = {name: copy.copy(hook) for name, hook in network.hooks.items()}
    for hook in stay.values():
        # Equal logits are never confident; the exit's own answer was taken before.
        object.__setattr__(hook, "write", lambda logits, decision: torch.zeros_like(logits))
    patient = HookedNetwork(network.model, stay, [("stages.1", "exit0")], num_classes=4)
    torch.testing.assert_close(patient(small).logits, with_exits()(small).logits)


def test_a_skipping_forward_that_leaves_at_other_exits_is_noticed(small: Tensor) -> None:
    network = with_exits(confidence=0.3)
    with pytest.raises(ValueError, match=r"gate 'exit1' (saw \d images, but 2 of 7 had the gates open that it lies within|did not fire)"):
        network(small, "skipped")


# ---- gates within gates, and one module for many gates ----


class Policy(nn.Module):
    """One look at the image decides for all blocks, as BlockDrop's policy network; a second gate per block halves the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_policy = nn.Sequential(Colour(3), nn.Sigmoid())
        self.gate_halves = nn.ModuleList([nn.Sequential(Colour(2), nn.Sigmoid()) for _ in range(3)])
        self.first, self.second = (nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)]) for _ in range(2))
        self.head = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features, policy = images, self.gate_policy(images)
        for index in range(3):
            halves = self.gate_halves[index](features)
            for column, convs in enumerate((self.first, self.second)):
                keep = policy[:, index] * halves[:, column] if index else policy[:, index]
                features = features + keep.view(-1, 1, 1, 1) * convs[index](features)
        return {"logits": self.head(features.mean((2, 3)))}


def test_one_policy_splits_into_gates_with_gates_within(small: Tensor) -> None:
    model = Policy()
    sharpen(model)
    hooks = {"policy": GateHook("gate_policy", split=3)}
    hooks |= {f"half{index}": GateHook(f"gate_halves.{index}", within=f"policy.{index}") for index in (1, 2)}
    charges: list[tuple[str, Any]] = [("first.0", "policy.0"), ("second.0", ["policy.0"])]
    charges += [(f"{part}.{index}", f"half{index}") for index in (1, 2) for part in ("first", "second")]
    network = HookedNetwork(model, hooks, charges, num_classes=4, logits="logits").eval()
    output = network(small)
    assert list(output.gates) == ["policy.0", "policy.1", "policy.2", "half1", "half2"]
    raw = model.gate_policy(small)
    for index in range(3):
        torch.testing.assert_close(output.gates[f"policy.{index}"].score, raw[:, index : index + 1])
    for index in (1, 2):
        policy, half = output.gates[f"policy.{index}"], output.gates[f"half{index}"]
        assert torch.equal(half.executed, (half.score >= 0.5) * (policy.score >= 0.5).float())
    ledger = price(network, small[:1])
    block = 3 * 3 * 9 * 64
    opened = output.gates["policy.0"].executed.sum(1) * 2 + sum(output.gates[f"half{index}"].executed.sum(1) for index in (1, 2))
    assert torch.equal(ledger(output.gates), ledger.fixed + opened.double() * block)
    pattern = {name: torch.ones(7, gate.score.shape[1]) for name, gate in output.gates.items()} | {"policy.2": torch.zeros(7, 1)}
    with forced(network, pattern):
        assert [gate.executed.mean().item() for gate in network(small).gates.values()] == [1, 1, 0, 1, 0]


def test_units_must_fit_the_gates_around_them(small: Tensor) -> None:
    hooks = {"policy": GateHook("gate_policy"), "half": GateHook("gate_halves.1", within="policy")}
    with pytest.raises(ValueError, match="gate 'half' has 2 units and lies within gates of 3; both must be equal, or one unit"):
        HookedNetwork(Policy(), hooks, [], num_classes=4, logits="logits")(small)
    hooks = {"half": GateHook("gate_halves.1"), "policy": GateHook("gate_policy", within="half", split=3)}
    with pytest.raises(ValueError, match="gate 'policy.0' fired before gate 'half', which it lies within"):
        HookedNetwork(Policy(), hooks, [], num_classes=4, logits="logits")(small)


class LastGate(nn.Module):
    """Four gates that look at the image, and one block that only the last of them keeps: who lies within whom is for the hooks to say."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList([nn.Sequential(Colour(), nn.Sigmoid()) for _ in range(4)])
        self.block, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        *_, last = [gate(images) for gate in self.gates]
        return self.answer(images, last)

    def answer(self, images: Tensor, keep: Tensor) -> Tensor:
        return self.head((images + as_map(keep) * self.block(images)).mean((2, 3)))


NESTS = {
    "a chain": ((), "0", "1", "2"),
    "one in the other": ((), "0", ("0", "1"), ("0", "1", "2")),
    "two in a third": ((), "0", "0", ("1", "2")),
}
"""What each of four gates is said to lie within; the last one lies within all others."""


@pytest.mark.parametrize("nest", NESTS)
def test_the_gradient_of_every_gate_around_counts_once(nest: str, small: Tensor) -> None:
    torch.manual_seed(5)
    model = LastGate()
    sharpen(model)
    hooks = {str(index): GateHook(f"gates.{index}", within=within) for index, within in enumerate(NESTS[nest])}
    network = HookedNetwork(model, hooks, [("block", "3")], num_classes=4).eval()
    pixels = small.clone().requires_grad_()
    output = network(pixels)
    decided = [straight_through(name, gate.score, gate.threshold, training=False) for name, gate in output.gates.items()]
    kept = torch.stack(decided).prod(0)
    assert torch.equal(output.gates["3"].executed, kept)
    # Both where all of them are open and where one alone is closed.
    assert {3.0, 4.0} <= set(torch.stack(decided).sum(0).flatten().tolist())
    expected = model.answer(pixels, kept)
    torch.testing.assert_close(output.logits, expected)
    found, wanted = (torch.autograd.grad(logits.square().sum(), pixels, retain_graph=True)[0] for logits in (output.logits, expected))
    torch.testing.assert_close(found, wanted)


class Loop(nn.Module):
    """One block and one halting gate, over and over."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.block, self.head = nn.Sequential(Colour(), nn.Sigmoid()), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        features, going = images, torch.ones(len(images), 1)
        for _ in range(3):
            going = going * self.gate(features)
            features = features + as_map(going) * self.block(features)
        return self.head(features.mean((2, 3)))


def test_a_gate_that_fires_again_and_again_can_lie_within_its_own_last_call(small: Tensor) -> None:
    model = Loop()
    sharpen(model)
    network = HookedNetwork(model, {"go": GateHook("gate", fires=3, within="go")}, [], num_classes=4).eval()
    gates = network(small).gates
    asked = torch.cat([gate.score for gate in gates.values()], dim=1) >= 0.5
    assert {name: gate.within for name, gate in gates.items()} == {"go.0": (), "go.1": ("go.0",), "go.2": ("go.0", "go.1")}
    assert torch.equal(gate_table(gates).executed, asked.float().cumprod(1))
    for wrong, message in [(2, "fired again: module 'gate' was called more than 2 time"), (4, r"gate 'go.3' did not fire: .* called 3 time")]:
        with pytest.raises(ValueError, match=message):
            HookedNetwork(model, {"go": GateHook("gate", fires=wrong)}, [], num_classes=4)(small)


# ---- what cannot be done is said ----


def test_a_network_that_cannot_skip_says_so(small: Tensor) -> None:
    network = hooked("logit")
    ledger = price(network, small[:1])
    assert measuring_execution(network) == "masked"
    for attempt in (lambda: network(small, "skipped"), lambda: audit(network, small), lambda: compare_routes(network, small, ledger)):
        with pytest.raises(ValueError, match="Blocks cannot be run skipped: HookedNetwork was given no skipping forward"):
            attempt()
    with pytest.raises(ValueError, match="execution must be one of"):
        network(small, "sparse")  # type: ignore[arg-type]


def test_a_gate_that_is_not_written_decides_by_itself(small: Tensor) -> None:
    network = hooked("logit")
    hooks = {"gate0": GateHook("gates.0", score=lambda logit: logit.sigmoid()), "gate1": network.hooks["gate1"]}
    alone = HookedNetwork(network.model, hooks, [("blocks.0", "gate0")], num_classes=4)
    assert torch.equal(alone(small).logits, network(small).logits)
    with pytest.raises(ValueError, match="gate 'gate0' cannot be held open: dense execution and prices need GateHook"):
        price(alone, small[:1])
    pattern = {name: 1 - gate.executed for name, gate in network(small).gates.items()}
    with forced(alone, pattern), pytest.raises(ValueError, match="gate 'gate0' decides by itself"):
        alone(small)


BAD_HOOKS: dict[str, tuple[dict[str, Any], str]] = {
    "module": ({"module": "gate.0"}, "gate 'gate0': Blocks has no module 'gate.0'; did you mean 'gates.0'"),
    "at": ({"at": "gates.7"}, "gate 'gate0': Blocks has no module 'gates.7'"),
    "no path": ({"module": ""}, "Blocks has no module ''"),
    "score": ({"score": "odds"}, "score must be one of probability, logit, softmax2, confidence, or a callable, got 'odds'"),
    "write": ({"write": "odds"}, "write must be one of auto, decision, onehot, logit, softmax2, a callable or None, got 'odds'"),
    "threshold": ({"threshold": 1.0}, r"threshold must be in \(0, 1\), the scale of the score, got 1.0"),
    "fires": ({"fires": 0}, "fires and split must be at least 1, got 0 and 1"),
    "within": ({"within": "gate1"}, "gate 'gate0' lies within 'gate1', which is no gate before it"),
    "itself": ({"within": "gate0"}, "gate 'gate0' lies within 'gate0', which is no gate before it"),
}


@pytest.mark.parametrize("case", BAD_HOOKS)
def test_a_wrong_hook_is_refused_when_built(case: str) -> None:
    settings, message = BAD_HOOKS[case]
    model = hooked("logit").model
    with pytest.raises(ValueError, match=message):
        first = GateHook(**{"module": "gates.0", "score": "logit", **settings})
        HookedNetwork(model, {"gate0": first, "gate1": GateHook("gates.1", score="logit")}, [("blocks.0", "gate0")], num_classes=4)


BAD_NETWORKS: dict[str, tuple[dict[str, Any], str]] = {
    "no gates": ({"gates": {}}, "gates must name at least one gate"),
    "charged module": ({"charges": [("block.0", "gate")]}, "the charge of gate: Blocks has no module 'block.0'; did you mean 'blocks.0'"),
    "charged gate": ({"charges": [("blocks.0", "gates")]}, "module 'blocks.0' is charged to 'gates', which is no gate; did you mean 'gate'"),
    "overhead": ({"overhead": ["gat"]}, "overhead: Blocks has no module 'gat'"),
    "skipped": ({"skipped": "forward_skip"}, "skipped: Blocks has no method 'forward_skip'"),
    "classes": ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    "same name": ({"gates": {"a": GateHook("gates.0", fires=2), "a.0": GateHook("gates.1")}}, "two gates are named 'a.0'"),
    "same output": ({"gates": {"a": GateHook("gates.0"), "b": GateHook("gates.0")}}, "gates 'a' and 'b' read the same output of module 'gates.0'"),
}


@pytest.mark.parametrize("case", BAD_NETWORKS)
def test_a_wrong_network_is_refused_when_built(case: str) -> None:
    settings, message = BAD_NETWORKS[case]
    with pytest.raises(ValueError, match=message):
        HookedNetwork(
            hooked("logit").model, **{"gates": {"gate": GateHook("gates.0")}, "charges": [("blocks.0", "gate")], "num_classes": 4, **settings}
        )


BAD_PASSES: dict[str, tuple[str, dict[str, Any], str]] = {
    "a logit is no probability": ("logit", {}, r"gate 'gate0': the score must be in \[0, 1\], got -.*; see GateHook"),
    "a tuple": ("mask, log", {}, "the score must be a tensor with one row per image, got a tuple of 2; see select and score"),
    "one class": ("logit", {"score": "softmax2"}, r"softmax2 needs two classes on axis 1, or on the last axis of \(B, U, 2\), got \(7, 1\)"),
    "no exit": ("logit", {"score": "confidence"}, r"an exit needs class logits of shape \(B, K\), got \(7, 1\)"),
    "no such index": ("mask, log", {"select": 2}, r"has no element 2 \(select\): it is a tuple of 2"),
    "no such key": ("mapping", {"select": "kept"}, r"has no element 'kept' \(select\): it is a mapping with keys extra, keep"),
    "no such attribute": ("named tuple", {"select": "kept"}, r"has no element 'kept' \(select\)"),
    "other rows": ("logit", {"score": lambda logit: logit[:2].sigmoid()}, r"the score has shape \(2, 1\), but there are 7 images"),
    "nothing": ("logit", {"score": lambda logit: logit[:, :0]}, "the score has no units"),
    "no parts": ("logit", {"score": "logit", "split": 2}, "has 1 units, which do not split into 2 equal parts"),
    "one-hot of one": ("probability", {"write": "onehot"}, "decisions as pairs cannot be written as 'onehot' into a tensor of shape"),
    "too late": ("logit", {"score": "logit", "at": "gates.1"}, r"\(7, 1\) decisions|was called before|more often"),
    "too early": ("logit", {"module": "gates.1", "score": "logit", "at": "gates.0"}, "module 'gates.0' was called before gate 'gate0' decided"),
    "never written": ("logit", {"score": "logit", "at": "spare"}, "the decision of gate 'gate0' was not written: module 'spare' was not called"),
    "never called": ("logit", {"module": "spare"}, "gate 'gate0' did not fire: module 'spare' was called 0 time"),
}


@pytest.mark.parametrize("case", BAD_PASSES)
def test_a_wrong_pass_is_an_error(case: str, small: Tensor) -> None:
    kind, settings, message = BAD_PASSES[case]
    network = hooked(kind)
    network.model.spare = nn.Linear(1, 1)
    if case == "too late":
        network.model.gates.append(network.model.gates[1])
        network.model.blocks.append(network.model.blocks[1])
    broken = HookedNetwork(network.model, {"gate0": GateHook(**{"module": "gates.0", **settings})}, [], num_classes=4)
    with pytest.raises(ValueError, match=message):
        broken(small)
    assert hooks_left(broken) == 0


def test_logits_of_another_shape_are_refused(small: Tensor) -> None:
    model = hooked("logit").model
    hooks = {"gate": GateHook("gates.0", score="logit")}
    for settings, message in [
        ({"num_classes": 5}, r"the logits must be a tensor of shape \(7, 5\), got a tensor of shape \(7, 4\)"),
        ({"num_classes": 4, "logits": "logits"}, r"the output of Blocks has no element 'logits' \(logits\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            HookedNetwork(model, hooks, [], **settings)(small)


def test_gates_that_round_before_the_hook_cannot_be_attacked(small: Tensor) -> None:
    network = HookedNetwork(
        hooked("Gumbel").model,
        {f"gate{i}": GateHook(f"gates.{i}", score=lambda p: p[:, 1], write="onehot") for i in range(2)},
        [("blocks.0", "gate0"), ("blocks.1", "gate1")],
        num_classes=4,
    )
    with pytest.raises(ValueError, match="no gate passes a gradient to the image: hook the modules before their scores are rounded or detached"):
        GradMDM(steps=1)(network, small)


# ---- it is a module like any other, and leaves the model alone ----


def hooks_left(network: nn.Module) -> int:
    """Forward hooks beside the idle one."""
    return sum(
        hook.__name__ != "idle" for module in network.modules() for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def test_nothing_is_left_behind(small: Tensor) -> None:
    network = hooked("Gumbel")
    before = set(vars(network))
    output = network(small.clone().requires_grad_())
    kept = [weakref.ref(tensor) for gate in output.gates.values() for tensor in (gate.score, gate.executed)]
    assert hooks_left(network) == 0
    assert set(vars(network)) == before
    del output
    gc.collect()
    assert all(reference() is None for reference in kept)


def test_the_state_is_the_models_own(small: Tensor) -> None:
    network = hooked("soft probability")
    assert set(network.state_dict()) == {f"model.{name}" for name in network.model.state_dict()}
    assert not network.model.training
    assert network.train().model.training
    network.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in network.model.parameters())
    assert not network(small).logits.requires_grad


def test_a_copy_has_hooks_of_its_own(small: Tensor) -> None:
    network = hooked("own score")
    twin = copy.deepcopy(network)
    assert torch.equal(twin(small).logits, network(small).logits)
    with torch.no_grad():
        twin.model.gates[0][0].linear.bias += 100
    assert twin(small).gates["gate0"].executed.tolist() == [[1.0]] * 7
    assert network(small).gates["gate0"].executed.mean() < 1
    twin.load_state_dict(network.state_dict())
    assert torch.equal(twin(small).logits, network(small).logits)


def test_a_gate_before_batchnorm_keeps_its_score_under_attack(small: Tensor) -> None:
    class Folding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.block, self.head = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 3), nn.Linear(3, 4)
            nn.init.constant_(self.gate[1].bias, 5.0)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.gate(images).mean((2, 3)) * self.block(images).mean((2, 3)))

    class Watching(PowerLoss):
        def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
            scores.append(table.score.detach())
            return super().__call__(table, weights)

    network = HookedNetwork(Folding(), {"gate": GateHook("gate.0", score="logit")}, [("block", "gate")], num_classes=4).eval()
    scores = [network(small).gates["gate"].score.detach()]
    EnergyAttack(Watching(), steps=1, warmup=0.0)(network, small)
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-3)


def test_scores_are_float32_under_autocast(small: Tensor) -> None:
    for kind in ("logit", "two classes", "probability"):
        with torch.autocast("cpu", torch.bfloat16):
            output = hooked(kind)(small)
        assert {gate.score.dtype for gate in output.gates.values()} == {torch.float32}


# ---- the whole house ----


def for_digits(skips: bool = False) -> HookedNetwork:
    """Gates of closures and lambdas, which no pickle takes, that open for some of the digits."""
    torch.manual_seed(0)
    model = Blocks(lambda: nn.Sequential(Colour(), nn.Sigmoid()), lambda p: as_map(p))
    model.head = nn.Linear(3, 10)
    sharpen(model)
    gates = {f"gate{i}": GateHook(f"gates.{i}", score=lambda p: p * 1.0, write=lambda p, keep: keep) for i in range(2)}
    network = HookedNetwork(
        model, gates, [(f"blocks.{i}", f"gate{i}") for i in range(2)], num_classes=10, normalize=lambda pixels: (pixels - 0.1) / 0.3
    ).eval()
    images = torch.cat([batch.images for split in ("val", "test") for batch in batches(digits(), split)])
    with torch.no_grad():
        for index in range(2):
            model.gates[index][0].linear.bias -= network(images).gates[f"gate{index}"].score.logit().median()
    return network


def test_energy_adversarial_training_defends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network, report = for_digits(), GateReport()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    objective = EnergyAdversarialObjective(ComputeTarget(0.7))
    task = EnergyAdversarialTraining(network, GradMDM(steps=1, warmup=0.0), objective, Optimization(lr=0.02, schedule="constant"))
    recovery = RecoveryCallback(GradMDM(gamma=0.1, steps=2, lr=0.05), images=4)
    run = trainer(tmp_path, limit_train_batches=1, limit_val_batches=1, callbacks=[report, recovery])
    run.fit(task, digits())
    assert {"train/distillation", "train/compute", "val/accuracy", "val/recovery_percent"} <= run.callback_metrics.keys()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    # The parent that is distilled is a copy with hooks of its own, still as it was.
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.parent.state_dict().items())
    printed = capsys.readouterr().out
    assert "hooks, nothing skipped" in printed
    assert "the ledger alone says" in printed.replace("\n", " ")
    for row in report.rows[:2]:
        # The hooks' column: everything ran.
        assert row[4] == row[1] != row[3]
    run.save_checkpoint(tmp_path / "run.ckpt")
    again = EnergyAdversarialTraining(for_digits(), GradMDM(steps=1, warmup=0.0), objective)
    again.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"], strict=False)
    assert all(torch.equal(tensor, again.network.state_dict()[name]) for name, tensor in network.state_dict().items())


def test_it_is_attacked_and_recorded_by_the_ledger(tmp_path: Path) -> None:
    network, attack = for_digits(), GradMDM(gamma=0.1, steps=5, lr=0.05)
    task = EnergyAttackEvaluation(network, attack)
    trainer(tmp_path, callbacks=[ResultFiles(), GateReport()]).test(task, digits(), verbose=False)
    rows = {row.id: row for row in task.rows}
    assert len(rows) == 12
    for batch in batches(digits(), "test"):
        ledger = price(network, batch.images[:1])
        clean, attacked = (ledger(network(images).gates) for images in (batch.images, attack(network, batch.images).images))
        for index, identity in enumerate(batch.ids.tolist()):
            assert rows[identity].flops_clean == clean[index].item()
            assert rows[identity].flops_adversarial == attacked[index].item()
    assert sum(row.flops_adversarial - row.flops_clean for row in rows.values()) > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["network"]["name"] == "HookedNetwork"
    assert summary["network"]["model"] == "Blocks"
    assert summary["network"]["skips"] is False


def test_with_a_skipping_forward_the_tasks_really_skip(tmp_path: Path) -> None:
    network, report = pair(True)[1], GateReport()
    run = trainer(tmp_path, limit_test_batches=1, callbacks=[report])
    run.test(EnergyAttackEvaluation(network, GradMDM(steps=1)), digits(), verbose=False)
    assert report.skipped
    assert all(row[3] == row[4] for row in report.rows[:5])
