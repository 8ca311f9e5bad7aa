"""Shallow-Deep networks against an analytic count, plain CNNs written out with functions, and the original's rule image by image."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import pytest
import torch
from tests.training import QUIET, digits, statistics, trainer
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.flops import audit, compare_routes, price, random_patterns
from gatewatt.gating import Execution, check_finite, forced, gate_table
from gatewatt.networks import ResNet
from gatewatt.networks.shallow_deep import BACKBONES, BackboneName, Fallback, MixedPooling, ShallowDeep
from gatewatt.objectives import CrossEntropy
from gatewatt.objectives.exits import InternalClassifiers, WeightedExits
from gatewatt.tasks import DynamicTraining, Optimization

pytestmark = QUIET

NAMES: tuple[BackboneName, ...] = ("resnet-20", "resnet-56", "vgg-16", "wrn-32-4", "mobilenet")
SMALL: dict[BackboneName, int] = {"resnet-20": 16, "vgg-16": 32, "wrn-32-4": 16, "mobilenet": 16}
"""Backbones for tests that run them, and the smallest sensible image side."""


def tiny(backbone: BackboneName = "resnet-20", confidence: float = 0.5, fallback: Fallback = "confident", seed: int = 1) -> ShallowDeep:
    """Four channels in the first group, BatchNorm statistics that are not the identity, eval mode."""
    torch.manual_seed(seed)
    network = ShallowDeep(backbone, 5, confidence=confidence, fallback=fallback, width=4, size=SMALL[backbone])
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.7, 1.3)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return network.eval()


@pytest.fixture
def images() -> Tensor:
    """Seven 16x16 images of different contrast."""
    generator = torch.Generator().manual_seed(7)
    contrast = torch.linspace(0.1, 1, 7).view(-1, 1, 1, 1)
    return (0.5 + contrast * (torch.rand(7, 3, 16, 16, generator=generator) - 0.5)).clamp(0, 1)


@pytest.fixture
def network(images: Tensor) -> ShallowDeep:
    """A tiny ResNet-20 whose exits are tuned so that the seven images stop all over the place, two of them nowhere."""
    network, scales = tiny(), torch.logspace(-3, 3, 400).view(-1, 1, 1)
    with torch.no_grad():
        exits = network(images, "dense").exits
        for index, segment in enumerate(network.segments):
            # The sharpness at which a part of the images is sure: few at early exits, most at the last one.
            linear, logits = segment.exit[-1], exits[:, index]
            sure = ((scales * (logits - logits.mean(0))).softmax(2).amax(2) > 0.5).float().mean(1)
            wanted = 0.15 + 0.05 * index if index < 6 else 0.6
            scale = scales.flatten()[(sure >= wanted).nonzero()[0, 0]]
            linear.bias.copy_(scale * (linear.bias - logits.mean(0)))
            linear.weight.mul_(scale)
    return network


def chain(network: ShallowDeep, depth: Tensor) -> dict[str, Tensor]:
    """The decisions (B, 1) by which image b runs ``depth[b]`` segments after the first."""
    return {f"exit{index}": (depth >= index).float()[:, None] for index in range(1, len(network.segments))}


# ---- what it costs ----


def conv_macs(inputs: int, outputs: int, kernel: int, side: int) -> int:
    return inputs * outputs * kernel * kernel * side * side


class Count:
    """MACs of a CNN with internal classifiers, added up along the way."""

    def __init__(self, exits: tuple[int, ...], classes: int) -> None:
        self.exits, self.classes, self.total, self.block, self.cumulative = exits, classes, 0, 0, list[int]()

    def end_block(self, channels: int, side: int) -> None:
        """After a block: an internal classifier, if there is one, on 4x4 positions or as many as the map has."""
        if self.block in self.exits:
            self.total += channels * min(side, 4) ** 2 * self.classes
            self.cumulative.append(self.total)
        self.block += 1


def counted(backbone: BackboneName, classes: int = 10) -> list[int]:
    """Section 6.1 of the specification as arithmetic: cumulative MACs at every exit, the last one included; no layer of the package is looked at."""
    side = 32
    if backbone.startswith("resnet"):
        per_group, exits = (9, (3, 7, 9 + 2, 9 + 6, 18 + 1, 18 + 5)) if backbone == "resnet-56" else (3, (0, 1, 3, 4, 6, 7))
        count, channels = Count(exits, classes), 16
        count.total = conv_macs(3, 16, 3, side)
        for index in range(3 * per_group):
            outputs = 16 << index // per_group
            side = 32 >> index // per_group
            count.total += conv_macs(channels, outputs, 3, side) + conv_macs(outputs, outputs, 3, side)
            count.total += conv_macs(channels, outputs, 1, side) if channels != outputs else 0
            channels = outputs
            count.end_block(channels, side)
    elif backbone == "vgg-16":
        count, channels = Count((1, 3, 5, 6, 8, 9), classes), 3
        for index, outputs in enumerate([64] * 2 + [128] * 2 + [256] * 3 + [512] * 6):
            count.total += conv_macs(channels, outputs, 3, side)
            side //= 2 if index in (1, 3, 6, 9, 12) else 1
            channels = outputs
            count.end_block(channels, side)
        count.total += 2 * 512 * 512
    elif backbone == "wrn-32-4":
        count, channels = Count((2, 4, 5 + 1, 5 + 3, 10 + 0, 10 + 2), classes), 16
        count.total = conv_macs(3, 16, 3, side)
        for index in range(15):
            outputs = 64 << index // 5
            # The first convolution of a group still works on the side of the group before.
            count.total += conv_macs(channels, outputs, 3, side)
            side = 32 >> index // 5
            count.total += conv_macs(outputs, outputs, 3, side) + (conv_macs(channels, outputs, 1, side) if channels != outputs else 0)
            channels = outputs
            count.end_block(channels, side)
    else:
        count, channels = Count((2, 4, 6, 8, 11), classes), 32
        count.total = conv_macs(3, 32, 3, side)
        for index, outputs in enumerate([64, 128, 128, 256, 256] + [512] * 6 + [1024] * 2):
            side //= 2 if index in (1, 3, 5, 11) else 1
            count.total += channels * 9 * side * side + conv_macs(channels, outputs, 1, side)
            channels = outputs
            count.end_block(channels, side)
    return [*count.cumulative, count.total + channels * classes]


EXACT: dict[BackboneName, list[int]] = {
    "resnet-56": [19_319_296, 38_196_224, 56_027_136, 74_906_624, 92_742_656, 111_627_264, 125_783_680],
    "vgg-16": [39_528_448, 96_172_032, 152_836_096, 190_625_792, 247_330_816, 285_100_032, 313_940_992],
    "wrn-32-4": [199_682_048, 350_687_232, 541_548_544, 692_563_968, 883_445_760, 1_034_481_664, 1_185_479_168],
    "mobilenet": [10_031_104, 16_584_704, 23_068_672, 31_686_656, 42_379_264, 46_620_672],
    "resnet-20": [5_163_520, 9_884_672, 18_278_400, 23_002_112, 31_400_960, 36_129_792, 40_849_024],
}
SPECIFIED: dict[BackboneName, str] = {
    "resnet-56": "19.32 38.20 56.03 74.91 92.74 111.63 125.78",
    "vgg-16": "39.53 96.17 152.84 190.63 247.33 285.10 313.94",
    "wrn-32-4": "199.7 350.7 541.6 692.6 883.5 1034.5 1185.5",
    "mobilenet": "10.03 16.58 23.07 31.69 42.38 46.62",
}
"""Millions of MACs at every exit as the specification prints them."""


@pytest.mark.parametrize("backbone", SPECIFIED)
def test_the_analytic_count_is_the_specification(backbone: BackboneName) -> None:
    # 541.548544 and 883.445760 of WRN-32-4 are printed as 541.6 and 883.5: rounded to two decimals first, then to one.
    hundredths = [(Decimal(macs) / 10**6).quantize(Decimal("0.01"), ROUND_HALF_UP) for macs in EXACT[backbone]]
    printed = [Decimal(text) for text in SPECIFIED[backbone].split()]
    assert [macs.quantize(text, ROUND_HALF_UP) for macs, text in zip(hundredths, printed, strict=True)] == printed


@pytest.mark.parametrize("backbone", NAMES)
def test_the_price_list_is_the_analytic_count_to_the_last_mac(backbone: BackboneName) -> None:
    assert counted(backbone) == EXACT[backbone]
    network = ShallowDeep(backbone)
    ledger = price(network, torch.zeros(1, 3, 32, 32))
    prices = [ledger.prices[f"segments.{index}"] for index in range(1, len(EXACT[backbone]))]
    assert list(itertools.accumulate([ledger.fixed, *prices])) == EXACT[backbone]
    assert ledger.dense == EXACT[backbone][-1]
    assert ledger.overhead == 0
    # An image that stops at once costs what the first exit costs, and one that runs on until exit i what exit i costs.
    depths = torch.arange(len(prices) + 1)
    with torch.no_grad(), forced(network.eval(), chain(network, depths)):
        gates = network(torch.zeros(len(depths), 3, 32, 32), "skipped").gates
    assert ledger(gates).tolist() == EXACT[backbone]
    share = torch.tensor(prices, dtype=torch.float64)
    torch.testing.assert_close(ledger.weights(gates), share / share.sum())


def test_the_small_backbone_has_its_exits_at_similar_shares() -> None:
    shares = [macs / EXACT["resnet-20"][-1] for macs in EXACT["resnet-20"][:-1]]
    assert shares == pytest.approx([0.15, 0.30, 0.45, 0.60, 0.75, 0.90], abs=0.06)


def test_other_sizes_and_classes_are_built() -> None:
    network = ShallowDeep("mobilenet", 200, size=64, width=4).eval()
    assert network(torch.rand(2, 3, 64, 64)).exits.shape == (2, 6, 200)
    assert price(network, torch.zeros(1, 3, 64, 64)).resolution == (64, 64)


# ---- the CNN in it ----


class State:
    """The tensors of a network's state in order, without its internal classifiers, to be used up by a CNN written out with functions."""

    def __init__(self, network: ShallowDeep) -> None:
        last = f"segments.{len(network.segments) - 1}."
        state = {name: tensor for name, tensor in network.state_dict().items() if ".exit." not in name or name.startswith(last)}
        self.tensors: Iterator[Tensor] = iter([tensor for name, tensor in state.items() if not name.startswith("normalize.")])

    def conv(self, features: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
        weight = next(self.tensors)
        return functional.conv2d(features, weight, stride=stride, padding=weight.shape[-1] // 2, groups=groups)

    def norm_relu(self, features: Tensor) -> Tensor:
        weight, bias, mean, variance, _ = (next(self.tensors) for _ in range(5))
        return functional.batch_norm(features, mean, variance, weight, bias).relu()

    def linear(self, features: Tensor) -> Tensor:
        return features @ next(self.tensors).T + next(self.tensors)


def standardized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return (images - mean) / std


def static_logits(backbone: BackboneName, network: ShallowDeep, images: Tensor) -> Tensor:
    """The CNN of section 6.1 as functions."""
    state, features = State(network), standardized(images)
    if backbone == "resnet-20":
        plain = ResNet(20, 5, width=4).eval()
        names = [name for name in plain.state_dict() if not name.startswith("normalize.")]
        plain.load_state_dict(dict(zip(names, state.tensors, strict=True)), strict=False)
        plain.normalize = network.normalize
        return plain(images)
    if backbone == "vgg-16":
        for index in range(13):
            features = state.norm_relu(state.conv(features))
            features = functional.max_pool2d(features, 2) if index in (1, 3, 6, 9, 12) else features
        return state.linear(state.linear(state.linear(features.flatten(1)).relu()))
    if backbone == "wrn-32-4":
        features = state.conv(features)
        for index in range(15):
            stride = 2 if index in (5, 10) else 1
            residual = state.conv(state.norm_relu(state.conv(state.norm_relu(features))), stride)
            # A block that changes the number of channels projects; the order of the state is that of the block's parts.
            features = residual + (state.conv(features, stride) if index % 5 == 0 else features)
        return state.linear(state.norm_relu(features).mean((2, 3)))
    features = state.norm_relu(state.conv(features))
    for index in range(13):
        features = state.norm_relu(state.conv(features, 2 if index in (1, 3, 5, 11) else 1, groups=features.shape[1]))
        features = state.norm_relu(state.conv(features))
    return state.linear(features.mean((2, 3)))


@pytest.mark.parametrize("backbone", SMALL)
def test_all_gates_open_is_the_static_cnn(backbone: BackboneName) -> None:
    network, images = tiny(backbone, fallback="last"), torch.rand(3, 3, SMALL[backbone], SMALL[backbone])
    opened = {charge.gates[0]: torch.ones(3, 1) for charge in network.charges}
    with torch.no_grad():
        expected = static_logits(backbone, network, images)
        for execution in ("masked", "skipped", "dense"):
            with forced(network, opened):
                output = network(images, execution)
            torch.testing.assert_close(output.logits, expected)
            torch.testing.assert_close(output.exits[:, -1], expected)
        # Dense is the CNN whatever the gates and the fallback say.
        torch.testing.assert_close(tiny(backbone, confidence=0.01)(images, "dense").logits, expected)


def test_mixed_pooling_is_its_formula() -> None:
    pooling, features = MixedPooling(2), torch.randn(2, 3, 4, 6)
    assert 0 <= pooling.share.item() < 1
    with torch.no_grad():
        pooling.share.fill_(1.7)  # nothing binds it to [0, 1]
    windows = features.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    torch.testing.assert_close(pooling(features), 1.7 * windows.amax(4) - 0.7 * windows.mean(4))
    (slope,) = torch.autograd.grad(pooling(features).sum(), pooling.share)
    assert slope.item() == pytest.approx((windows.amax(4) - windows.mean(4)).sum().item(), rel=1e-5)


def test_an_internal_classifier_is_its_description(images: Tensor) -> None:
    network = tiny()
    output, features = network(images, "dense"), network.normalize(images)
    for index, segment in enumerate(network.segments):
        features = segment.body(features)
        if index < 6:
            side, linear = features.shape[-1], segment.exit[-1]
            windows = features.unfold(2, max(side // 4, 1), max(side // 4, 1)).unfold(3, max(side // 4, 1), max(side // 4, 1)).flatten(4)
            share = segment.exit[0].share if side >= 8 else 0.0
            pooled = share * windows.amax(4) + (1 - share) * windows.mean(4)
            torch.testing.assert_close(output.exits[:, index], pooled.flatten(1) @ linear.weight.T + linear.bias)


# ---- where an image stops ----


def original_rule(network: ShallowDeep, image: Tensor, q: float, fallback: Fallback) -> tuple[Tensor, int]:
    """One image at a time: the first exit that is sure, else the most confident one (or the last); logits, and 0-based exit where it stopped."""
    exits = network(image[None], "dense").exits[0]
    confidences = exits.softmax(1).amax(1).tolist()
    for index, confidence in enumerate(confidences):
        if confidence > q:
            return exits[index], index
    chosen = confidences.index(max(confidences)) if fallback == "confident" else len(exits) - 1
    return exits[chosen], len(exits) - 1


@pytest.mark.parametrize("fallback", ["confident", "last"])
@pytest.mark.parametrize("q", [0.3, 0.5, 0.8])
def test_an_image_gets_the_logits_of_the_first_exit_that_is_sure(network: ShallowDeep, images: Tensor, q: float, fallback: Fallback) -> None:
    network.confidence, network.fallback = q, fallback
    with torch.no_grad():
        expected = [original_rule(network, image, q, fallback) for image in images]
        stops = [stop for _, stop in expected]
        if q == 0.5:
            assert len(set(stops)) >= 4, "the images should stop in different places"
        for execution in ("masked", "skipped"):
            output = network(images, execution)
            torch.testing.assert_close(output.logits, torch.stack([logits for logits, _ in expected]))
            assert gate_table(output.gates).executed.sum(1).tolist() == stops


def test_an_image_that_no_exit_is_sure_about_gets_its_most_confident_one(network: ShallowDeep, images: Tensor) -> None:
    network.confidence = 0.999
    with torch.no_grad():
        confident = network(images, "skipped")
        network.fallback = "last"
        last = network(images, "skipped")
    unsure = (gate_table(confident.gates).executed.sum(1) == 6) & (confident.exits[:, -1].softmax(1).amax(1) <= 0.999)
    assert bool(unsure.any())
    best = confident.exits.softmax(2).amax(2).argmax(1)
    assert bool((best[unsure] < 6).any()), "some earlier exit should be more confident than the last one"
    torch.testing.assert_close(confident.logits[unsure], confident.exits[torch.arange(7), best][unsure])
    torch.testing.assert_close(last.logits[unsure], last.exits[:, -1][unsure])


def test_what_ran_is_the_product_along_the_chain(network: ShallowDeep, images: Tensor) -> None:
    output = network(images)
    table = gate_table(output.gates)
    own = (table.score >= 0.5).float()
    assert torch.equal(table.executed, own.cumprod(1))
    assert not torch.equal(table.executed, own), "a later exit should disagree with an earlier one"
    confidences = output.exits[:, :-1].softmax(2).amax(2)
    torch.testing.assert_close(table.score, (1 - confidences) / (1 - confidences + 0.5))
    dense = network(images, "dense")
    assert gate_table(dense.gates).executed.min() == 1
    torch.testing.assert_close(gate_table(dense.gates).score, table.score)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_masked_equals_skipped_wherever_images_are_forced_to_stop(network: ShallowDeep, images: Tensor, batch: int) -> None:
    for shift in range(7):
        depths = (torch.arange(batch) + shift) % 7
        with torch.no_grad(), forced(network, chain(network, depths)):
            masked, skipped = network(images[:batch], "masked"), network(images[:batch], "skipped")
        torch.testing.assert_close(masked.logits, skipped.logits)
        assert gate_table(skipped.gates).executed.sum(1).tolist() == depths.tolist()
        assert torch.equal(gate_table(masked.gates).executed, gate_table(skipped.gates).executed)
        check_finite(skipped)
        for image, depth in enumerate(depths.tolist()):
            torch.testing.assert_close(skipped.exits[image, : depth + 1], masked.exits[image, : depth + 1])
            # What never ran holds zeros, and its score repeats the last one known.
            assert skipped.exits[image, depth + 1 :].abs().max().item() == 0 if depth < 6 else True
            scores = gate_table(skipped.gates).score[image]
            torch.testing.assert_close(scores[: depth + 1], gate_table(masked.gates).score[image, : depth + 1])
            assert bool((scores[depth:] == scores[min(depth, 5)]).all())


def test_a_stopped_image_does_not_enter_the_next_segment(network: ShallowDeep, images: Tensor) -> None:
    rows: list[int] = []
    for segment in network.segments:
        segment.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    for depths, expected in [([0] * 7, [7]), ([0, 1, 1, 3, 6, 0, 2], [7, 5, 3, 2, 1, 1, 1]), ([6] * 7, [7] * 7), ([2] * 7, [7] * 3)]:
        rows.clear()
        with torch.no_grad(), forced(network, chain(network, torch.tensor(depths))):
            network(images, "skipped")
        assert rows == expected


def test_a_gate_behind_a_closed_one_does_not_run_even_when_forced(network: ShallowDeep, images: Tensor) -> None:
    pattern = {f"exit{index}": torch.tensor([[1.0], [float(index != 3)]]) for index in range(1, 7)}
    for execution in ("masked", "skipped"):
        with torch.no_grad(), forced(network, pattern):
            executed = gate_table(network(images[:2], execution).gates).executed
        assert executed.tolist() == [[1.0] * 6, [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("execution", ["masked", "skipped", "dense"])
def test_a_batch_is_its_images_one_by_one(network: ShallowDeep, images: Tensor, execution: Execution) -> None:
    with torch.no_grad():
        together, single = network(images, execution), [network(image[None], execution) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in single]))
    torch.testing.assert_close(together.exits, torch.cat([output.exits for output in single]))
    for part, expected in zip(gate_table(together.gates), zip(*(gate_table(output.gates) for output in single), strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(expected))


def test_scores_are_float32_under_autocast(network: ShallowDeep, images: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for execution in ("masked", "skipped"):
            output = network(images, execution)
            assert all(gate.score.dtype == gate.executed.dtype == torch.float32 for gate in output.gates.values())
            check_finite(output)


# ---- the routes ----


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_four_routes_agree_on_random_patterns(network: ShallowDeep, images: Tensor, batch: int) -> None:
    images = images[-batch:]
    ledger = price(network, images[:1])
    assert compare_routes(network, images, ledger).agree
    for pattern in random_patterns(network, images, 35, seed=batch):
        assert compare_routes(network, images, ledger, pattern).agree


@pytest.mark.parametrize("backbone", [name for name in SMALL if name != "resnet-20"])
def test_four_routes_agree_for_every_backbone(backbone: BackboneName) -> None:
    network, images = tiny(backbone), torch.rand(3, 3, SMALL[backbone], SMALL[backbone])
    ledger = price(network, images[:1])
    assert compare_routes(network, images, ledger).agree
    for depths in ([0, 0, 0], [1, 4, 2], [5, 3, 0], [6, 6, 6]):
        assert compare_routes(network, images, ledger, chain(network, torch.tensor(depths))).agree


def test_the_images_cost_what_an_audit_of_each_finds(network: ShallowDeep, images: Tensor) -> None:
    found = [audit(network, image[None]) for image in images]
    assert len(set(found)) >= 4
    assert price(network, images[:1])(network(images).gates).tolist() == found


# ---- what it learns from ----


def test_every_score_has_a_gradient_at_the_input_of_its_own_image_alone(network: ShallowDeep, images: Tensor) -> None:
    images = images[:3].requires_grad_()
    for gate in network(images).gates.values():
        (gradient,) = torch.autograd.grad(gate.score[1].sum(), images, retain_graph=True)
        assert bool(torch.isfinite(gradient).all())
        assert gradient[1].abs().max() > 0
        assert gradient[[0, 2]].abs().max() == 0
        assert not gate.executed.requires_grad


def test_joint_training_lowers_the_loss_of_every_exit(images: Tensor) -> None:
    torch.manual_seed(3)
    network, labels = ShallowDeep("resnet-20", 5, width=4, size=16), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    ledger, objective = price(network, images[:1]), WeightedExits()
    objective.progress = 0.5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    shares = [segment.exit[0].share.item() for segment in list(network.segments)[:4]]
    first: dict[str, float] = {}
    for _ in range(15):
        terms = objective(network(images), labels, ledger)
        first = first or {name: term.item() for name, term in terms.items()}
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert list(terms) == ["exit1", "exit2", "exit3", "exit4", "exit5", "exit6", "cross_entropy"]
    assert all(term.item() < 0.8 * first[name] for name, term in terms.items())
    assert all(segment.exit[0].share.item() != share for segment, share in zip(network.segments, shares, strict=False))


# Lightning says that the frozen CNN is in eval mode, which is the point.
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode at the start of training")
def test_internal_classifiers_are_trained_on_a_cnn_that_stands_still(tmp_path: Path) -> None:
    torch.manual_seed(4)
    network = ShallowDeep("vgg-16", 10, width=4, train_backbone=False)
    before, moments = copy.deepcopy(network.state_dict()), statistics(network)
    optimization = Optimization("adamw", lr=1e-2, weight_decay=5e-4, schedule="constant")
    task = DynamicTraining(network, InternalClassifiers(), optimization)
    seen = set()
    network.register_forward_hook(lambda module, inputs, output: seen.add((module.training, module.segments[-1].training)))
    trainer(tmp_path, max_steps=3).fit(task, digits())
    assert (True, True) in seen, "the network itself is in train mode"
    moved = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if ".exit." in name and not name.startswith("segments.6.")}
    assert all(torch.equal(tensor, moments[name]) for name, tensor in statistics(network).items())
    # Dropout of the head rests too: the CNN gives one answer in train mode, the one of eval mode.
    images = torch.rand(2, 3, 32, 32)
    network.train()
    assert not any(module.training for module in network.modules() if isinstance(module, (nn.Dropout, nn.BatchNorm2d)))
    logits = network(images, "dense").logits
    assert torch.equal(logits, network.eval()(images, "dense").logits)
    assert not logits.requires_grad
    assert network(images).exits[:, 0].requires_grad


def test_a_trained_cnn_can_be_given_its_classifiers_in_a_second_stage(images: Tensor) -> None:
    # Stage one: dense execution and cross entropy reach the CNN and nothing else.
    torch.manual_seed(5)
    arguments = {"backbone": "resnet-20", "num_classes": 5, "width": 4, "size": 16}
    parent = ShallowDeep(**arguments)
    ledger = price(parent, images[:1])
    CrossEntropy()(parent(images, "dense"), torch.arange(7) % 5, ledger)["cross_entropy"].backward()
    untouched = {name for name, parameter in parent.named_parameters() if parameter.grad is None}
    assert untouched == {name for name, _ in parent.named_parameters() if ".exit." in name and not name.startswith("segments.6.")}
    # Stage two: the same state fits, and only those classifiers are trained.
    child = ShallowDeep(**arguments, train_backbone=False)
    child.load_state_dict(parent.state_dict())
    assert {name for name, parameter in child.named_parameters() if parameter.requires_grad} == untouched
    assert ShallowDeep(**arguments).train().segments[0].body.training


# ---- what is refused, and what rebuilds ----


def test_the_arguments_rebuild_the_network(network: ShallowDeep, images: Tensor) -> None:
    again = ShallowDeep(**json.loads(json.dumps(network.arguments))).eval()
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images).logits, network(images).logits)
    assert list(BACKBONES) == ["resnet-20", "resnet-56", "vgg-16", "wrn-32-4", "mobilenet"]
    cifar100 = ShallowDeep("resnet-20", 100, mean=(0.507, 0.487, 0.441), std=(0.267, 0.256, 0.276), width=4)
    assert cifar100.normalize.mean.flatten().tolist() == pytest.approx([0.507, 0.487, 0.441])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet-50"}, "backbone must be one of resnet-20, resnet-56, vgg-16, wrn-32-4, mobilenet, got 'resnet-50'"),
        ({"confidence": 0.0}, r"confidence must be in \(0, 1\), a softmax probability, got 0.0"),
        ({"confidence": 1.0}, "confidence must be in"),
        ({"fallback": "first"}, "fallback must be confident or last, got 'first'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"width": 6}, "width must be a positive multiple of 4, got 6"),
        ({"width": 0}, "got 0"),
        ({"backbone": "vgg-16", "size": 16}, "size must be a multiple of 32 for vgg-16, got 16"),
        ({"backbone": "mobilenet", "size": 40}, "size must be a multiple of 16 for mobilenet, got 40"),
        ({"size": 0}, "size must be a multiple of 4 for resnet-56, got 0"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShallowDeep(**arguments)  # type: ignore[arg-type]


def test_what_cannot_run_is_refused(images: Tensor) -> None:
    network = tiny()
    with pytest.raises(ValueError, match="execution must be one of masked, dense, skipped, got 'sparse'"):
        network(images, "sparse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"built for 16x16 images, got \(2, 3, 32, 32\); set its size"):
        network(torch.rand(2, 3, 32, 32))
