"""SkipNet against an analytic count, a static network with the same weights, and itself in its other executions."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, conv2d
from torchvision.models import resnet18, resnet50

from gatewatt.flops import price
from gatewatt.gating import Execution, check_finite, decision_named, forced, gate_table
from gatewatt.networks import ResNet, SkipNet
from gatewatt.networks.skipnet import HIDDEN, GateKind, RecurrentGates

GATE_KINDS: tuple[GateKind, ...] = ("recurrent", "feedforward1", "feedforward2")


@pytest.fixture(params=GATE_KINDS)
def network(request: pytest.FixtureRequest) -> SkipNet:
    """A tiny network with each kind of gate, in eval mode, with BatchNorm statistics that are not the identity."""
    torch.manual_seed(1)
    network = SkipNet(14, width=4, gate=request.param)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.7, 1.3)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
    return network.eval()


def every_pattern(network: SkipNet, batch: int) -> list[dict[str, Tensor]]:
    """Patterns such that each image of the batch meets all combinations of gates, and images of a batch disagree."""
    names = [f"block{index}" for index in range(1, len(network.blocks))]
    combinations = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(names))))
    rolled = [torch.stack([combinations.roll(5 * image, 0)[row] for image in range(batch)]) for row in range(len(combinations))]
    return [{name: pattern[:, index : index + 1] for index, name in enumerate(names)} for pattern in rolled]


# ---- what it costs ----


class Count(NamedTuple):
    """MACs of a SkipNet by arithmetic alone: always computed, each optional block, the gates."""

    always: int
    blocks: list[int]
    gates: int


def conv_macs(inputs: int, outputs: int, kernel: int, side: int) -> int:
    return inputs * outputs * kernel * kernel * side * side


def counted(depth: int, side: int, classes: int) -> Count:
    """Section 2.1 of the specification as arithmetic: no layer of the package is looked at."""
    imagenet = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
    groups = imagenet.get(depth) or ((depth - 2) // 6,) * 3
    bottleneck = depth in (50, 101, 152)
    if depth in imagenet:
        first_width, always, side = 64, conv_macs(3, 64, 7, side // 2), side // 4
    else:
        first_width, always = 16, conv_macs(3, 16, 3, side)
    channels, optional, gates = first_width, [], 0
    for group, number in enumerate(groups):
        width = first_width * 2**group
        outputs = 4 * width if bottleneck else width
        for position in range(number):
            before = side
            side = side // 2 if group and not position else side
            if bottleneck:
                block = conv_macs(channels, width, 1, before) + conv_macs(width, width, 3, side) + conv_macs(width, outputs, 1, side)
            else:
                block = conv_macs(channels, width, 3, side) + conv_macs(width, width, 3, side)
            always += conv_macs(channels, outputs, 1, side) if channels != outputs else 0
            if group == position == 0:
                always += block
            else:
                # 1x1 embedding of the previous block's channels, the LSTM's two matrices for its four gates, the projection.
                gates += channels * 10 + 4 * 10 * (10 + 10) + 10
                optional.append(block)
            channels = outputs
    return Count(always + channels * classes, optional, gates)


# depth, gates N, then in millions of MACs as the specification prints them: always on, gated, total, gate overhead (None: "less than 0.06").
CIFAR_TABLE = [
    (38, 17, "5.42", "77.86", "83.28", "0.020"),
    (74, 35, "5.42", "162.79", "168.22", "0.041"),
    (110, 53, "5.42", "247.73", "253.15", "0.062"),
]
IMAGENET_TABLE = [
    (18, 7, "369.0", "1445", "1814", None),
    (34, 15, "369.0", "3295", "3664", None),
    (50, 15, "659.6", "3430", "4089", "0.16"),
    (101, 32, "659.6", "7142", "7801.4", "0.35"),
    (152, 49, "659.6", "10854", "11514", "0.52"),
]


def as_printed(macs: float, like: str) -> str:
    """Millions of MACs with as many decimals as the specification gives."""
    return f"{macs / 1e6:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize(("depth", "gates", "always", "gated", "total", "overhead"), CIFAR_TABLE + IMAGENET_TABLE)
def test_the_analytic_count_is_the_specification(depth: int, gates: int, always: str, gated: str, total: str, overhead: str | None) -> None:
    cifar = depth in {row[0] for row in CIFAR_TABLE}
    count = counted(depth, 32 if cifar else 224, 10 if cifar else 1000)
    assert len(count.blocks) == gates
    assert as_printed(count.always, always) == always
    assert as_printed(sum(count.blocks), gated) == gated
    assert as_printed(count.always + sum(count.blocks), total) == total
    # The specification's ImageNet figures include the gate after the last block, which the original computes and drops; the CIFAR ones do not.
    dropped = 0 if cifar else {18: 512, 34: 512}.get(depth, 2048) * 10 + 810
    assert count.gates + dropped < 0.06e6 if overhead is None else as_printed(count.gates + dropped, overhead) == overhead


@pytest.mark.parametrize(("depth", "side", "classes"), [*((row[0], 32, 10) for row in CIFAR_TABLE), *((row[0], 224, 1000) for row in IMAGENET_TABLE)])
def test_the_price_list_is_the_analytic_count_to_the_last_mac(depth: int, side: int, classes: int) -> None:
    count, ledger = counted(depth, side, classes), price(SkipNet(depth, classes), torch.zeros(1, 3, side, side))
    assert ledger.overhead == count.gates
    assert ledger.fixed == count.always + count.gates
    assert [ledger.prices[f"trunk.blocks.{index}.residual"] for index in range(1, len(count.blocks) + 1)] == count.blocks
    assert ledger.dense == count.always + count.gates + sum(count.blocks)


@pytest.mark.parametrize("kind", ["feedforward1", "feedforward2"])
def test_a_feedforward_gate_costs_12_to_16_percent_of_its_block(kind: GateKind) -> None:
    ledger = price(SkipNet(8, gate=kind), torch.zeros(1, 3, 32, 32))
    pooled = 16 if kind == "feedforward1" else 32
    expected = sum(
        (conv_macs(channels, channels, 3, pooled // scale) if kind == "feedforward1" else 0)
        + conv_macs(channels, channels, 3, pooled // scale // 2)
        + 2 * channels
        for channels, scale in [(16, 1), (32, 2)]
    )
    assert ledger.overhead == expected
    first = conv_macs(16, 16, 3, pooled // 2) + (conv_macs(16, 16, 3, pooled) if kind == "feedforward1" else 0) + 32
    assert 0.12 < first / (2 * conv_macs(16, 16, 3, 32)) < 0.16


# ---- what it computes ----


def static_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """A CIFAR ResNet written out with functions, on the tensors of a trunk's state."""

    def norm(features: Tensor, name: str) -> Tensor:
        part = {key: state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")}
        return batch_norm(features, **part)

    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1), torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)
    features = norm(conv2d((images - mean) / std, state["stem.0.weight"], padding=1), "stem.1").relu()
    index = 0
    while f"blocks.{index}.residual.0.weight" in state:
        name, shortcut = f"blocks.{index}", features
        # Only a block that halves the side projects, at these widths.
        stride = 2 if f"{name}.shortcut.0.weight" in state else 1
        if stride == 2:
            shortcut = norm(conv2d(features, state[f"{name}.shortcut.0.weight"], stride=2), f"{name}.shortcut.1")
        features = norm(conv2d(features, state[f"{name}.residual.0.weight"], stride=stride, padding=1), f"{name}.residual.1").relu()
        features = (norm(conv2d(features, state[f"{name}.residual.3.weight"], padding=1), f"{name}.residual.4") + shortcut).relu()
        index += 1
    return features.mean((2, 3)) @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("execution", ["masked", "skipped", "dense"])
def test_all_gates_open_is_the_static_network(network: SkipNet, images: Tensor, execution: Execution) -> None:
    opened = {f"block{index}": torch.ones(len(images), 1) for index in range(1, len(network.blocks))}
    static = ResNet(14, width=4).eval()
    static.load_state_dict(network.trunk.state_dict())
    with torch.no_grad(), forced(network, opened):
        logits = network(images, execution).logits
    torch.testing.assert_close(logits, static_logits(network.trunk.state_dict(), images))
    assert torch.equal(logits, static(images))


@pytest.mark.parametrize(("depth", "reference"), [(18, resnet18), (50, resnet50)])
def test_the_imagenet_trunk_is_torchvisions(depth: int, reference: type[nn.Module]) -> None:
    trunk, torchvisions = ResNet(depth, 5).eval(), reference(num_classes=5).eval()
    state = {name: tensor for name, tensor in trunk.state_dict().items() if not name.startswith("normalize.")}
    torchvisions.load_state_dict(dict(zip(torchvisions.state_dict(), state.values(), strict=True)))
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(trunk(images), torchvisions((images - mean) / std), rtol=1e-4, atol=1e-4)


def test_a_closed_block_leaves_its_shortcut(network: SkipNet, images: Tensor) -> None:
    closed = {f"block{index}": torch.zeros(len(images), 1) for index in range(1, len(network.blocks))}
    trunk = network.trunk
    with torch.no_grad(), forced(network, closed):
        logits = network(images, "skipped").logits
        features = trunk.blocks[0](trunk.stem(trunk.normalize(images)))
        # Projection and BatchNorm of the two transitions, without a ReLU.
        features = network.blocks[4].shortcut(network.blocks[2].shortcut(features))
        torch.testing.assert_close(logits, trunk.head(features.mean((2, 3))))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_masked_logits_equal_skipped_logits_for_every_pattern(network: SkipNet, images: Tensor, batch: int) -> None:
    patterns = every_pattern(network, batch)
    assert len(patterns) == 2**5
    for pattern in patterns:
        with torch.no_grad(), forced(network, pattern):
            masked, skipped = network(images[:batch], "masked"), network(images[:batch], "skipped")
        torch.testing.assert_close(masked.logits, skipped.logits)
        torch.testing.assert_close(gate_table(masked.gates), gate_table(skipped.gates))


def test_a_skipped_block_is_not_called_and_an_open_one_on_its_images_only(network: SkipNet, images: Tensor) -> None:
    rows: dict[str, int] = {}
    for index, block in enumerate(network.blocks):
        name = f"block{index}"
        block.residual.register_forward_hook(lambda module, inputs, output, name=name: rows.__setitem__(name, len(inputs[0])))
    for pattern in every_pattern(network, 3):
        rows.clear()
        with torch.no_grad(), forced(network, pattern):
            network(images[:3], "skipped")
        opened = {name: int(decisions.sum()) for name, decisions in pattern.items() if decisions.any()}
        assert rows == {"block0": 3, **opened}


@pytest.mark.parametrize("execution", ["masked", "skipped", "dense"])
def test_a_batch_is_its_images_one_by_one(network: SkipNet, images: Tensor, execution: Execution) -> None:
    with torch.no_grad():
        together, single = network(images, execution), [network(image[None], execution) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in single]))
    for part, expected in zip(gate_table(together.gates), zip(*(gate_table(output.gates) for output in single), strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(expected))


def test_the_output_has_one_shape_in_every_execution(network: SkipNet, images: Tensor) -> None:
    for execution in ("masked", "skipped", "dense"):
        output = network(images, execution)
        check_finite(output)
        assert output.logits.shape == (7, 10)
        assert list(output.gates) == ["block1", "block2", "block3", "block4", "block5"]
        for gate in output.gates.values():
            assert gate.score.shape == gate.executed.shape == (7, 1)
            assert bool(((gate.score >= 0) & (gate.score <= 1)).all())
            assert gate.threshold.item() == 0.5
            assert torch.equal(gate.executed, torch.ones(7, 1) if execution == "dense" else gate.open.float())
            assert not gate.executed.requires_grad


# ---- what it learns from ----


def test_every_score_has_a_gradient_at_the_input_of_its_own_image_alone(network: SkipNet, images: Tensor) -> None:
    images = images[:3].requires_grad_()
    for gate in network(images).gates.values():
        (gradient,) = torch.autograd.grad(gate.score[1].sum(), images, retain_graph=True)
        assert bool(torch.isfinite(gradient).all())
        assert gradient[1].abs().max() > 0
        assert gradient[[0, 2]].abs().max() == 0


def test_the_straight_through_gradient_follows_the_chain_rule(network: SkipNet, images: Tensor) -> None:
    network.double()
    images = images[:2].double().requires_grad_()
    straight = network(images)
    (found,) = torch.autograd.grad(straight.logits.square().sum(), images)
    # The same decisions as constants of their own: then dL/dx = dL/dx at constant m + sum of dL/dm_i dG_i/dx, gate after gate from the last.
    pattern = {name: gate.executed.double().requires_grad_() for name, gate in straight.gates.items()}
    with forced(network, pattern):
        constant = network(images)
    loss = constant.logits.square().sum()
    for name in reversed(pattern):
        (slope,) = torch.autograd.grad(loss, pattern[name], retain_graph=True)
        loss = loss + (slope.detach() * constant.gates[name].score).sum()
    (expected,) = torch.autograd.grad(loss, images)
    # The straight-through scores themselves are float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    plain = torch.autograd.grad(network_with(network, "hard")(images).logits.square().sum(), images)[0]
    assert (found - plain).abs().max() > 1e-3 * plain.abs().max(), "the decisions carried no gradient at all"


def network_with(network: SkipNet, decision: str) -> SkipNet:
    network.decision = decision_named(decision)
    return network


@pytest.mark.parametrize(("decision", "carries"), [("straight_through", True), ("sampled", False), ("hard", False)])
def test_logits_teach_the_gates_only_straight_through(network: SkipNet, images: Tensor, decision: str, carries: bool) -> None:
    logits = network_with(network, decision).train()(images).logits
    gradients = torch.autograd.grad(logits.square().sum(), list(network.gating.parameters()), allow_unused=True)
    assert any(gradient is not None and bool(gradient.any()) for gradient in gradients) == carries


def test_sampled_decisions_are_drawn_in_training_and_hard_in_evaluation(network: SkipNet, images: Tensor) -> None:
    network_with(network, "sampled")
    with torch.no_grad():
        for gate in network.eval()(images).gates.values():
            assert torch.equal(gate.executed, gate.open.float())
        network.train()
        draws = [gate_table(network(images).gates) for _ in range(30)]
    drawn = torch.stack([draw.executed for draw in draws])
    assert drawn.unique().tolist() == [0.0, 1.0]
    expected = torch.stack([draw.score for draw in draws])
    # Five standard errors of the mean over all draws.
    error = 5 * (expected * (1 - expected)).sum().sqrt() / expected.numel()
    assert (drawn.mean() - expected.mean()).abs() < error


# ---- how it is built ----


def test_recurrent_gates_are_the_originals_lstm_unrolled() -> None:
    channels = [4, 6, 8]
    gates = RecurrentGates(channels, imagenet=False)
    lstm = nn.LSTM(HIDDEN, HIDDEN)
    lstm.load_state_dict({f"{name}_l0": tensor for name, tensor in gates.controller.state_dict().items()})
    features = [torch.randn(2, count, 5, 5) for count in channels]
    pooled = [feature.mean((2, 3)) for feature in features]
    embedded = torch.stack([value @ layer.weight[:, :, 0, 0].T + layer.bias for value, layer in zip(pooled, gates.embed, strict=True)])
    expected = torch.sigmoid(lstm(embedded)[0] @ gates.projection.weight.T + gates.projection.bias)
    state, scores = None, []
    for index, feature in enumerate(features):
        score, state = gates(feature, index, state)
        scores.append(score)
    torch.testing.assert_close(torch.stack(scores), expected)


def test_the_stages_share_their_parameter_names() -> None:
    supervised, reinforced = SkipNet(8, width=4), SkipNet(8, width=4, decision="sampled")
    reinforced.load_state_dict(supervised.state_dict())


def test_the_arguments_rebuild_the_network() -> None:
    network = SkipNet(14, 7, gate="feedforward2", decision="sampled", width=3)
    twin = SkipNet(**network.arguments)
    assert twin.arguments == network.arguments
    assert twin.decision is network.decision
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == {name: tensor.shape for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 39}, r"depth must be 6n \+ 2 \(CIFAR: 20, 38, 74, 110, .*got 39"),
        ({"depth": 2}, "got 2"),
        ({"depth": -4}, "got -4"),
        ({"depth": 8, "gate": "lstm"}, "gate must be recurrent, feedforward1 or feedforward2, got 'lstm'"),
        ({"depth": 8, "decision": "soft"}, "decision must be one of .* got 'soft'"),
        ({"depth": 8, "width": 0}, "width must be at least 1"),
        ({"depth": 8, "num_classes": 1}, "num_classes at least 2, got 16 and 1"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipNet(**arguments)  # type: ignore[arg-type]


def test_an_unknown_execution_is_refused(network: SkipNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match="execution must be one of masked, dense, skipped, got 'sparse'"):
        network(images, "sparse")
