"""ManiDP against arithmetic, convolutions on sliced weights, a static network with the same weights, and itself in its other executions."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from gatewatt.flops import ExecutionMeter, compare_routes, price, random_patterns
from gatewatt.gating import Execution, check_finite, forced, gate_table, split_output
from gatewatt.networks.manidp import LIMIT, UNCALIBRATED, LiveConv, ManiDP, MaskBlock, alike, keep_score
from gatewatt.networks.resnet import resnet_layout


def tiny(depth: int = 8, width: int = 4, seed: int = 1) -> ManiDP:
    """In eval mode, with BatchNorm statistics that are not the identity."""
    torch.manual_seed(seed)
    network = ManiDP(depth, width=width)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.7, 1.3)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return network.eval()


def calibrate(network: ManiDP, images: Tensor, rate: float = 0.6) -> None:
    """Thresholds at the mean saliency that so many channels reach, one mask block after the other."""
    for name, block in network.masks.items():
        with torch.no_grad():
            aux = network(images).aux
        means = aux[f"saliency/{name}"].mean(0).sort(descending=True).values
        block.xi.copy_(means[round(rate * len(means)) - 1])
        block.spread.copy_(aux[f"response/{name}"].std())


@pytest.fixture
def network(images: Tensor) -> ManiDP:
    """Tiny and calibrated: some channels are kept by all images, some by a few, some by none."""
    network = tiny()
    calibrate(network, images)
    return network


# ---- what it costs ----


class Count(NamedTuple):
    """MACs of a ManiDP by arithmetic alone: always computed, the two convolutions of every block, the mask blocks; and its channel gates."""

    always: int
    convolutions: list[int]
    masks: int
    channels: list[int]

    @property
    def prunable(self) -> int:
        return sum(self.convolutions)


def counted(depth: int, side: int, classes: int, first_width: int | None = None) -> Count:
    """Section 5.1 of the specification as arithmetic: no layer of the package is looked at."""
    imagenet = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    if depth in imagenet:
        width = first_width or 64
        always, side = 3 * width * 49 * (side // 2) ** 2, side // 4
    else:
        width = first_width or 16
        always = 3 * width * 9 * side**2
    channels, convolutions, masks, gates = width, [], 0, []
    for group, number in enumerate(imagenet.get(depth) or ((depth - 2) // 6,) * 3):
        outputs = width * 2**group
        for position in range(number):
            side = side // 2 if group and not position else side
            convolutions += [9 * side**2 * channels * outputs, 9 * side**2 * outputs * outputs]
            hidden = outputs if outputs < 80 else outputs // 2
            masks += (channels + outputs) * hidden + 2 * outputs * hidden
            always += channels * outputs * side**2 if channels != outputs else 0
            gates += [outputs, outputs]
            channels = outputs
    return Count(always + channels * classes, convolutions, masks, gates)


# depth: gates N, always on, prunable, total and mask overhead to the last MAC; then the four in millions as the specification prints them.
TABLE = {
    20: ((672, 705_152, 40_108_032, 40_813_184, 61_952), ("0.71", "40.11", "40.81", "0.06")),
    32: ((1120, 705_152, 68_419_584, 69_124_736, 104_960), ("0.71", "68.42", "69.13", "0.11")),
    56: ((2016, 705_152, 125_042_688, 125_747_840, 190_976), ("0.71", "125.04", "125.75", "0.19")),
    18: ((3840, 137_793_536, 1_676_279_808, 1_814_073_344, 1_323_008), ("137.8", "1676", "1814", "1.3")),
    34: ((7552, 137_793_536, 3_525_967_872, 3_663_761_408, 2_453_504), ("137.8", "3526", "3664", "2.5")),
}


def full(depth: int) -> tuple[int, int]:
    """Side and classes of the full-size network."""
    return (224, 1000) if depth in (18, 34) else (32, 10)


def as_printed(macs: float, like: str) -> str:
    """Millions of MACs with as many decimals as the specification gives."""
    return f"{macs / 1e6:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("depth", TABLE)
def test_the_analytic_count_is_the_specification(depth: int) -> None:
    (gates, always, prunable, total, masks), printed = TABLE[depth]
    count = counted(depth, *full(depth))
    assert (sum(count.channels), count.always, count.prunable, count.always + count.prunable, count.masks) == (gates, always, prunable, total, masks)
    # The specification adds up its rounded figures (0.71 + 68.42), and its overhead includes one addition per bias.
    summed = float(as_printed(always, printed[0])) + float(as_printed(prunable, printed[1]))
    assert as_printed(always, printed[0]) == printed[0]
    assert as_printed(prunable, printed[1]) == printed[1]
    assert printed[2] in (as_printed(total, printed[2]), as_printed(1e6 * summed, printed[2]))
    assert as_printed(masks + gates, printed[3]) == printed[3]


@pytest.mark.parametrize("depth", TABLE)
def test_the_price_list_is_the_analytic_count_to_the_last_mac(depth: int) -> None:
    side, classes = full(depth)
    count, ledger = counted(depth, side, classes), price(ManiDP(depth, classes), torch.zeros(1, 3, side, side))
    assert ledger.overhead == count.masks
    assert ledger.fixed == count.always + count.masks
    assert list(ledger.prices.values()) == count.convolutions
    assert ledger.dense == count.always + count.masks + count.prunable
    assert list(ledger.units.values()) == count.channels


def test_a_charge_is_the_product_of_live_channels_in_and_out(network: ManiDP, images: Tensor) -> None:
    ledger = price(network, images[:1])
    counts = counted(8, 32, 10, 4)
    gates = network(images).gates
    for image, flops in enumerate(ledger(gates).tolist()):
        live = {name: int(gate.executed[image].sum()) for name, gate in gates.items()}
        total = counts.always + counts.masks
        for index, (side, inputs, outputs) in enumerate([(32, 4, 4), (16, 4, 8), (8, 8, 16)]):
            assert len(gates[f"block{index}.mask1"].executed[image]) == outputs
            n1, n2 = live[f"block{index}.mask1"], live[f"block{index}.mask2"]
            total += 9 * side**2 * (inputs * n1 + n1 * n2)
        assert flops == total


def test_the_weight_of_a_channel_is_what_it_costs_at_full_width(network: ManiDP, images: Tensor) -> None:
    gates = network(images[:1]).gates
    weights = dict(zip(gates, price(network, images[:1]).weights(gates).split([4, 4, 8, 8, 16, 16]), strict=True))
    costs = {}
    for index, (side, inputs, outputs) in enumerate([(32, 4, 4), (16, 4, 8), (8, 8, 16)]):
        costs[f"block{index}.mask1"], costs[f"block{index}.mask2"] = 9 * side**2 * (inputs + outputs), 9 * side**2 * outputs
    whole = sum(costs[name] * len(weight) for name, weight in weights.items())
    for name, weight in weights.items():
        assert weight.tolist() == pytest.approx([costs[name] / whole] * len(weight))


def sliced(network: ManiDP, image: Tensor) -> tuple[Tensor, int]:
    """Logits of one image by convolutions on sliced weights, with what they cost, written with functions alone."""
    state = network.state_dict()

    def norm(features: Tensor, name: str, channels: Tensor) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{key}"][channels][:, None, None] for key in ("running_mean", "running_var", "weight", "bias"))
        return (features - mean) / (var + 1e-5).sqrt() * weight + bias

    def convolve(features: Tensor, weight: Tensor, stride: int = 1) -> tuple[Tensor, int]:
        if 0 in weight.shape:
            return torch.zeros(1, len(weight), features.shape[2] // stride, features.shape[3] // stride), 0
        with FlopCounterMode(display=False) as counter:
            convolved = functional.conv2d(features, weight, stride=stride, padding=1)
        return convolved, counter.get_total_flops() // 2

    def saliency(pooled: Tensor, name: str) -> tuple[Tensor, Tensor]:
        hidden = (state[f"{name}.reduce.weight"] @ pooled).relu()
        response = state[f"{name}.expand.weight"] @ hidden + state[f"{name}.expand.bias"]
        values = response.clamp(0, 1000)
        return values, ((values >= state[f"{name}.xi"]) & (values > 0)).nonzero().flatten()

    mean = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1) / 255
    std = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1) / 255
    features = functional.conv2d(((image - mean) / std)[None], state["stem.0.weight"], padding=1)
    features = norm(features, "stem.1", torch.arange(features.shape[1])).relu()
    macs = 0
    for index in range(len(network.blocks)):
        block = f"blocks.{index}"
        first, live = saliency(features[0].mean((1, 2)), f"{block}.mask1")
        shortcut, stride = features, 1
        if f"{block}.shortcut.weight" in state:
            shortcut, stride = functional.conv2d(features, state[f"{block}.shortcut.weight"], stride=2), 2
        hidden, first_macs = convolve(features, state[f"{block}.conv_a.layers.0.weight"][live], stride)
        hidden = norm(hidden, f"{block}.conv_a.layers.1", live).relu() * first[live][:, None, None]
        pooled = torch.zeros(shortcut.shape[1])
        pooled[live] = hidden[0].mean((1, 2))
        second, kept = saliency(pooled, f"{block}.mask2")
        residual, second_macs = convolve(hidden, state[f"{block}.conv_b.layers.0.weight"][kept][:, live])
        macs += first_macs + second_macs
        residual = norm(residual, f"{block}.conv_b.layers.1", kept) * second[kept][:, None, None]
        features = shortcut.clone()
        features[:, kept] += residual
        features = features.relu()
    return state["head.weight"] @ features[0].mean((1, 2)) + state["head.bias"], macs


@pytest.mark.parametrize("execution", ["masked", "skipped"])
def test_it_computes_and_costs_what_convolutions_on_sliced_weights_do(network: ManiDP, images: Tensor, execution: Execution) -> None:
    ledger = price(network, images[:1])
    with torch.no_grad():
        output = network(images, execution)
        found = [sliced(network, image) for image in images]
    torch.testing.assert_close(output.logits, torch.stack([logits for logits, _ in found]), rtol=1e-4, atol=1e-4)
    assert [flops - ledger.fixed for flops in ledger(output.gates).tolist()] == [macs for _, macs in found]
    assert len({macs for _, macs in found}) > 3, "the images should differ in what they cost"


# ---- the routes agree ----


@pytest.mark.parametrize(("batch", "patterns"), [(1, 52), (2, 26), (3, 24)])
def test_four_routes_and_arithmetic_agree_on_random_patterns(batch: int, patterns: int, images: Tensor) -> None:
    images = images[:batch, :, :8, :8].contiguous()
    network = tiny(width=2)
    ledger, count = price(network, images[:1]), counted(8, 8, 10, 2)
    for pattern in random_patterns(network, images, patterns, seed=batch):
        routes = compare_routes(network, images, ledger, pattern)
        assert routes.agree
        total = batch * (count.always + count.masks)
        for index in range(3):
            channels, (first, second) = count.channels[2 * index], count.convolutions[2 * index : 2 * index + 2]
            n1, n2 = (pattern[f"block{index}.mask{which}"].sum(1) for which in (1, 2))
            total += int(first // channels * n1.sum() + second // channels**2 * (n1 * n2).sum())
        assert routes.ledger == routes.traced == routes.dispatched == routes.hooked == total


def test_four_routes_agree_on_an_imagenet_trunk(images: Tensor) -> None:
    network, images = tiny(18, width=2), images[:2]
    ledger = price(network, images[:1])
    for pattern in random_patterns(network, images, 3):
        assert compare_routes(network, images, ledger, pattern).agree


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_four_routes_agree_when_the_gates_decide(network: ManiDP, images: Tensor, batch: int) -> None:
    ledger = price(network, images[:1])
    routes = compare_routes(network, images[:batch], ledger)
    assert routes.agree
    assert routes.ledger == ledger(network(images[:batch]).gates).sum().item()


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_four_routes_agree_where_everything_is_closed_or_open(network: ManiDP, images: Tensor, first: int, second: int) -> None:
    images, ledger = images[:2], price(network, images[:1])
    pattern = {name: torch.full((2, gate.score.shape[1]), float((first, second)[name.endswith("2")])) for name, gate in network(images).gates.items()}
    routes = compare_routes(network, images, ledger, pattern)
    assert routes.agree
    convolutions = counted(8, 32, 10, 4).convolutions
    assert routes.ledger == 2 * (ledger.fixed + first * sum(convolutions[::2]) + first * second * sum(convolutions[1::2]))


# ---- which channels are kept ----


def test_an_uncalibrated_network_keeps_every_channel(images: Tensor) -> None:
    network = tiny()
    ledger = price(network, images[:1])
    for xi in (UNCALIBRATED, -torch.inf):
        for block in network.masks.values():
            block.xi.fill_(xi)
        output = network(images)
        check_finite(output)
        assert ledger(output.gates).tolist() == [ledger.dense] * 7
        assert bool((gate_table(output.gates).executed == 1).all())
        assert any(bool((output.aux[f"saliency/{name}"] == 0).any()) for name in output.gates), "also channels that are dead"


def test_a_score_is_at_least_one_half_exactly_where_the_channel_is_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype, xi, spread in itertools.product([torch.float32, torch.float64], [0.0, 1e-30, 0.3, 2.0, 900.0], [1e-4, 1.0, 50.0]):
        bound = torch.tensor(xi, dtype=dtype)
        near = [bound]
        for direction in (-torch.inf, torch.inf):
            for _ in range(4):
                near.append(torch.nextafter(near[-1], torch.tensor(direction, dtype=dtype)))
            near.append(bound)
        spans = [scale * torch.randn(500, generator=generator, dtype=dtype) for scale in (1e-6, 1.0, 30.0)]
        response = torch.cat([torch.stack(near), *(bound + span for span in spans), torch.zeros(1, dtype=dtype)])[None]
        score = keep_score(response, bound, torch.tensor(spread, dtype=dtype))
        saliency = response.clamp(min=0)
        assert torch.equal(score >= 0.5, (saliency >= bound) & (saliency > 0))
        assert bool(((score >= 0) & (score <= 1)).all())
        # It is the sigmoid to rounding, and rising.
        torch.testing.assert_close(score, torch.sigmoid((response - bound) / spread))
        assert bool((score[0, response[0].argsort()].diff() >= -1e-6).all())


def test_a_score_has_a_gradient_on_both_sides_also_where_the_saliency_is_dead() -> None:
    for xi, spread in [(0.0, 1.0), (0.7, 0.4), (UNCALIBRATED, -UNCALIBRATED)]:
        response = (max(xi, -1.0) + spread * torch.linspace(-12, 12, 49)).clamp(-50, 50)[None].requires_grad_()
        score = keep_score(response, torch.tensor(xi), torch.tensor(spread))
        (slope,) = torch.autograd.grad(score.sum(), response)
        assert bool((slope > 0).all())
        assert bool(torch.isfinite(slope).all())
        assert bool((response < 0).any())
        smooth = torch.sigmoid((response.detach() - xi) / spread)
        torch.testing.assert_close(slope, smooth * (1 - smooth) / spread)


def test_a_channel_of_no_saliency_is_left_out_though_the_threshold_is_zero(images: Tensor) -> None:
    network = tiny()
    for block in network.masks.values():
        block.xi.zero_()
        block.spread.fill_(1.0)
    output = network(images)
    for name, gate in output.gates.items():
        assert torch.equal(gate.executed, (output.aux[f"saliency/{name}"] > 0).float())
    assert bool((gate_table(output.gates).executed == 0).any())
    assert compare_routes(network, images[:3], price(network, images[:1])).agree


def test_saliencies_are_cut_off(images: Tensor) -> None:
    network = tiny()
    nn.init.constant_(network.masks["block0.mask1"].expand.bias, 5000.0)
    output = network(images)
    assert bool((output.aux["saliency/block0.mask1"] == LIMIT).all())
    assert bool((output.aux["response/block0.mask1"] > 4000).all())


def test_images_decide_for_themselves(network: ManiDP, images: Tensor) -> None:
    rates = gate_table(network(images).gates).executed.mean(0)
    assert bool(((rates > 0) & (rates < 1)).any())


# ---- what it computes ----


def static_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """A CIFAR ResNet whose projections have no BatchNorm, written out with functions; nothing of the mask blocks is read."""

    def norm(features: Tensor, name: str) -> Tensor:
        return functional.batch_norm(features, **{key: state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")})

    mean = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1) / 255
    std = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1) / 255
    features = norm(functional.conv2d((images - mean) / std, state["stem.0.weight"], padding=1), "stem.1").relu()
    index = 0
    while f"blocks.{index}.conv_a.layers.0.weight" in state:
        name, shortcut, stride = f"blocks.{index}", features, 1
        if f"{name}.shortcut.weight" in state:
            shortcut, stride = functional.conv2d(features, state[f"{name}.shortcut.weight"], stride=2), 2
        features = functional.conv2d(features, state[f"{name}.conv_a.layers.0.weight"], stride=stride, padding=1)
        features = functional.conv2d(norm(features, f"{name}.conv_a.layers.1").relu(), state[f"{name}.conv_b.layers.0.weight"], padding=1)
        features = (norm(features, f"{name}.conv_b.layers.1") + shortcut).relu()
        index += 1
    return features.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


def test_dense_execution_is_the_static_parent(network: ManiDP, images: Tensor) -> None:
    with torch.no_grad():
        output = network(images, "dense")
    torch.testing.assert_close(output.logits, static_logits(network.state_dict(), images))
    assert bool((gate_table(output.gates).executed == 1).all())


def test_the_imagenet_parent_is_torchvisions(images: Tensor) -> None:
    parent, torchvisions = ManiDP(18, 5).eval(), resnet18(num_classes=5).eval()
    own = {name: tensor for name, tensor in parent.state_dict().items() if not name.startswith("normalize.") and ".mask" not in name}
    torchvisions.load_state_dict(dict(zip(torchvisions.state_dict(), own.values(), strict=True)))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(parent(images[:2], "dense").logits, torchvisions((images[:2] - mean) / std), rtol=1e-4, atol=1e-4)


def test_saliencies_of_one_and_everything_kept_is_the_static_parent(images: Tensor) -> None:
    network = tiny()
    for block in network.masks.values():
        nn.init.zeros_(block.expand.weight)  # the bias is 1 from the start
    with torch.no_grad():
        assert torch.equal(network(images, "masked").logits, network(images, "dense").logits)


@pytest.mark.parametrize("execution", ["masked", "skipped", "dense"])
def test_a_batch_is_its_images_one_by_one(network: ManiDP, images: Tensor, execution: Execution) -> None:
    with torch.no_grad():
        together, single = network(images, execution), [network(image[None], execution) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in single]))
    for part, expected in zip(gate_table(together.gates), zip(*(gate_table(output.gates) for output in single), strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(expected))


def test_the_output_has_one_shape_in_every_execution(network: ManiDP, images: Tensor) -> None:
    names = [f"block{index}.mask{which}" for index in range(3) for which in (1, 2)]
    for execution in ("masked", "skipped", "dense"):
        output = network(images, execution)
        check_finite(output)
        assert output.logits.shape == (7, 10)
        assert list(output.gates) == list(network.masks) == names
        for (name, gate), channels in zip(output.gates.items(), (4, 4, 8, 8, 16, 16), strict=True):
            assert gate.score.shape == gate.executed.shape == (7, channels)
            assert gate.threshold.item() == 0.5
            assert torch.equal(gate.executed, torch.ones(7, channels) if execution == "dense" else gate.open.float())
            assert not gate.executed.requires_grad
            for kind in ("response", "saliency", "features") if execution == "masked" else ("response", "saliency"):
                assert output.aux[f"{kind}/{name}"].shape == (7, channels)
    first, second = split_output(network(images), [3, 4])
    assert first.aux["features/block0.mask1"].shape == (3, 4)
    assert second.aux["saliency/block2.mask2"].shape == (4, 16)


def test_the_features_are_the_pooled_convolutions_before_their_masks(network: ManiDP, images: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    block = network.blocks[1]
    for name in ("conv_a", "conv_b"):
        # A copy: the ReLU works in place.
        getattr(block, name).register_forward_hook(lambda module, inputs, output, name=name: seen.__setitem__(name, output.clone()))
    aux = network(images).aux
    torch.testing.assert_close(aux["features/block1.mask1"], seen["conv_a"].relu().mean((2, 3)))
    torch.testing.assert_close(aux["features/block1.mask2"], seen["conv_b"].mean((2, 3)))


def test_images_that_keep_the_same_channels_run_together_and_dead_convolutions_not_at_all(network: ManiDP, images: Tensor) -> None:
    calls: list[tuple[str, int, int, int]] = []
    for name, module in network.named_modules():
        if isinstance(module, LiveConv):

            def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                calls.append((name, len(inputs[0]), inputs[0].shape[1], output.shape[1]))

            module.register_forward_hook(note)
    pattern = {name: torch.ones(4, gate.score.shape[1]) for name, gate in network(images[:4]).gates.items()}
    pattern["block0.mask1"][:2, 1:] = 0  # two images keep one channel, two keep all four
    pattern["block1.mask2"][:3] = 0  # three images add nothing
    pattern["block2.mask1"][3] = 0  # one image has no hidden channel
    ledger = price(network, images[:1])
    calls.clear()
    with torch.no_grad(), forced(network, pattern), ExecutionMeter(network, ledger) as meter:
        network(images[:4], "skipped")
    assert sorted(calls) == [
        ("blocks.0.conv_a", 2, 4, 1),
        ("blocks.0.conv_a", 2, 4, 4),
        ("blocks.0.conv_b", 2, 1, 4),
        ("blocks.0.conv_b", 2, 4, 4),
        ("blocks.1.conv_a", 4, 4, 8),
        ("blocks.1.conv_b", 1, 8, 8),
        ("blocks.2.conv_a", 3, 8, 16),
        ("blocks.2.conv_b", 1, 0, 16),  # BatchNorm's shift alone: no convolution
        ("blocks.2.conv_b", 3, 16, 16),
    ]
    assert meter.flops["blocks.0.conv_a"] == 9 * 32**2 * 4 * (2 * 1 + 2 * 4)
    assert meter.flops["blocks.2.conv_b"] == 9 * 8**2 * 16 * 16 * 3


def test_groups_hold_every_image_once(images: Tensor) -> None:
    executed = (torch.rand(50, 3) < 0.5).float()
    groups = alike(executed)
    assert len(groups) == 8
    assert sorted(row for rows, _ in groups for row in rows.tolist()) == list(range(50))
    for rows, kept in groups:
        assert bool((executed[rows] == executed[rows[0]]).all())
        assert kept.tolist() == [channel for channel in range(3) if executed[rows[0], channel]]


def test_scores_are_float32_under_autocast(network: ManiDP, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        output = network(images)
    for name, gate in output.gates.items():
        assert gate.score.dtype == output.aux[f"saliency/{name}"].dtype == torch.float32
    assert network.double()(images.double()).gates["block0.mask1"].score.dtype == torch.float64


# ---- what it learns from ----


def test_every_score_has_a_gradient_at_the_input_of_its_own_image_alone(images: Tensor) -> None:
    network = tiny(width=8, seed=2)
    for block in network.masks.values():
        with torch.no_grad():
            block.expand.bias[::2] -= 4
    calibrate(network, images)
    images = images[:3].requires_grad_()
    output = network(images)
    dead = 0
    for name, gate in output.gates.items():
        for channel in range(gate.score.shape[1]):
            (gradient,) = torch.autograd.grad(gate.score[1, channel], images, retain_graph=True)
            assert bool(torch.isfinite(gradient).all())
            assert gradient[1].abs().max() > 0
            assert gradient[[0, 2]].abs().max() == 0
            dead += int(output.aux[f"saliency/{name}"][1, channel] == 0)
    assert dead > 0, "channels without saliency should be among them"


def test_logits_teach_kept_saliencies_alone(network: ManiDP, images: Tensor) -> None:
    output = network.train()(images)
    for name, gate in output.gates.items():
        (gradient,) = torch.autograd.grad(output.logits.square().sum(), output.aux[f"saliency/{name}"], retain_graph=True)
        assert bool((gradient[gate.executed == 0] == 0).all())
        assert bool((gradient[gate.executed == 1] != 0).any())


def test_the_gradient_of_a_kept_saliency_is_that_of_a_factor(network: ManiDP, images: Tensor) -> None:
    network.double()
    images = images[:2].double()
    output = network(images)
    name, step = "block2.mask2", 1e-6
    (gradient,) = torch.autograd.grad(output.logits[:, 3].sum(), output.aux[f"response/{name}"])
    bias = network.masks[name].expand.bias
    for channel in range(16):
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                bias[channel] += sign * step
                ends.append(network(images))
                bias[channel] -= sign * step
        assert torch.equal(ends[0].gates[name].executed, ends[1].gates[name].executed)
        slope = (ends[0].logits[:, 3] - ends[1].logits[:, 3]).sum() / (2 * step)
        assert gradient[:, channel].sum().item() == pytest.approx(slope.item(), abs=1e-7)


def test_dense_training_reaches_everything_but_the_mask_blocks(images: Tensor) -> None:
    network = tiny().train()
    network(images, "dense").logits.square().sum().backward()
    taught = {name for name, parameter in network.named_parameters() if parameter.grad is not None and bool(parameter.grad.any())}
    assert taught == {name for name, _ in network.named_parameters() if ".mask" not in name}


def test_masked_training_reaches_every_parameter(images: Tensor) -> None:
    network = tiny(width=8).train()
    network(images).logits.square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in network.parameters())


# ---- how it is built ----


def test_the_calibration_is_part_of_the_checkpoint_and_the_gate_threshold_is_not(network: ManiDP, images: Tensor) -> None:
    state = network.state_dict()
    assert {name for name in state if name.endswith((".xi", ".spread"))} == {
        f"{path}.{name}" for path in network.overhead for name in ("xi", "spread")
    }
    assert not any("threshold" in name for name in state)
    twin = ManiDP(**network.arguments).eval()
    twin.load_state_dict(state)
    assert twin.arguments == network.arguments
    assert torch.equal(twin(images).logits, network(images).logits)
    assert all(torch.equal(gate.executed, network(images).gates[name].executed) for name, gate in twin(images).gates.items())


def test_a_pass_leaves_the_network_as_it_was(network: ManiDP, images: Tensor) -> None:
    before, attributes = {name: tensor.clone() for name, tensor in network.state_dict().items()}, set(vars(network))
    for execution in ("masked", "skipped", "dense"):
        network(images, execution)
    assert set(vars(network)) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_mask_blocks_begin_at_one_and_are_half_as_wide_from_80_channels_on() -> None:
    small, large = MaskBlock(16, 64), MaskBlock(64, 128)
    assert small.reduce.weight.shape == (64, 16)
    assert large.reduce.weight.shape == (64, 64)
    assert large.expand.weight.shape == (128, 64)
    assert large.reduce.bias is None
    assert bool((large.expand.bias == 1).all())
    # Kaiming normal: variance 2 / inputs.
    assert large.reduce.weight.var().item() == pytest.approx(2 / 64, rel=0.1)


def test_only_the_imagenet_networks_normalise_their_projections() -> None:
    assert isinstance(ManiDP(8, width=2).blocks[1].shortcut, nn.Conv2d)
    assert isinstance(ManiDP(18, width=2).blocks[2].shortcut[1], nn.BatchNorm2d)  # type: ignore[index]
    assert isinstance(ManiDP(8, width=2).blocks[0].shortcut, nn.Identity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 50}, "ManiDP masks basic blocks: depth must be .* 18 or 34, got 50"),
        ({"depth": 39}, r"depth must be 6n \+ 2"),
        ({"depth": 8, "width": 0}, "width must be at least 1"),
        ({"depth": 8, "num_classes": 1}, "num_classes at least 2, got 16 and 1"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ManiDP(**arguments)


def test_an_unknown_execution_is_refused(network: ManiDP, images: Tensor) -> None:
    with pytest.raises(ValueError, match="execution must be one of masked, dense, skipped, got 'sparse'"):
        network(images, "sparse")  # type: ignore[arg-type]


def test_every_bottleneck_depth_is_refused() -> None:
    for depth in (50, 101, 152):
        assert resnet_layout(depth).bottleneck
        with pytest.raises(ValueError, match=f"got {depth}"):
            ManiDP(depth)


def test_neutral_masks_begin_as_the_parent() -> None:
    torch.manual_seed(0)
    network, images = ManiDP(8, width=4, neutral_masks=True).eval(), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(network(images, "masked").logits, network(images, "dense").logits, atol=1e-6)
        released = ManiDP(8, width=4).eval()
        assert not torch.allclose(released(images, "masked").logits, released(images, "dense").logits, atol=1e-3)
