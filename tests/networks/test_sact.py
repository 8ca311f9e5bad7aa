"""SACT and ACT against an analytic count, the published totals, a network written out with functions, and themselves in other executions."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.flops import ExecutionMeter, FlopsLedger, compare_routes, price, random_patterns
from gatewatt.gating import Execution, check_finite, forced, gate_table
from gatewatt.networks import SACT
from gatewatt.networks.sact import Halting, Standardize
from gatewatt.objectives import PonderCost

KINDS: tuple[Halting, ...] = ("position", "image")


def unsettled(depth: int, halting: Halting, **arguments: int) -> SACT:
    """A tiny network in eval mode whose BatchNorm is not the identity and whose units halt at every layer somewhere."""
    torch.manual_seed(3)
    network = SACT(depth, halting=halting, width=4, **arguments)
    for name, layer in network.named_modules():
        if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(layer.running_mean, -0.2, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.7, 1.3)
            nn.init.uniform_(layer.bias, -0.2, 0.2)
        if ".heads." in name and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.weight.data *= 2
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return network.eval()


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> SACT:
    """Three units per block."""
    return unsettled(20, request.param)


@pytest.fixture
def images(images: Tensor) -> Tensor:
    """Seven images of 16x16 pixels."""
    return images[:, :, :16, :16].contiguous()


def patterns(network: SACT, images: Tensor, count: int) -> list[dict[str, Tensor]]:
    """Random decisions; every third pattern lets some images halt altogether."""
    drawn = random_patterns(network, images, count, seed=len(images))
    for index, pattern in enumerate(drawn[::3]):
        for name in pattern:
            pattern[name][index % len(images)] *= float(index % 2)
    return drawn


# ---- what it costs ----


class Sizes(NamedTuple):
    """The architecture as numbers: units and channels of each block, side of its maps, channels of its input."""

    units: tuple[int, ...]
    widths: tuple[int, ...]
    sides: tuple[int, ...]
    bottleneck: bool

    @classmethod
    def of(cls, depth: int, side: int, width: int | None = None) -> Sizes:
        imagenet = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}.get(depth)
        units = imagenet or ((depth - 2) // 6,) * 3
        first, side = width or (64 if imagenet else 16), side // 4 if imagenet else side
        return cls(
            units, tuple(first * 2**block for block in range(len(units))), tuple(side // 2**block for block in range(len(units))), bool(imagenet)
        )


class Count(NamedTuple):
    """MACs by arithmetic alone: stem, first units and classifier; every other unit; every head."""

    always: int
    units: int
    heads: int


def dilated(mask: Tensor) -> int:
    """Positions of (H, W) that are on or touch one that is, one by one."""
    height, width = mask.shape
    on = set(map(tuple, mask.nonzero().tolist()))
    return sum(any((y + i, x + j) in on for i in (-1, 0, 1) for j in (-1, 0, 1)) for y in range(height) for x in range(width))


def counted(depth: int, side: int, classes: int, halting: Halting, width: int | None = None, pattern: dict[str, Tensor] | None = None) -> Count:
    """MACs of one image; ``pattern`` holds the decisions (1, U) of each gate, all open if left out."""
    sizes = Sizes.of(depth, side, width)
    first, wide = sizes.widths[0], 4 if sizes.bottleneck else 1
    always = 3 * first * 49 * (side // 2) ** 2 if sizes.bottleneck else 3 * first * 9 * side**2
    optional = heads = 0
    channels, before = first, sizes.sides[0]
    for block, (count, inner, now) in enumerate(zip(sizes.units, sizes.widths, sizes.sides, strict=True)):
        outputs = wide * inner
        if sizes.bottleneck:
            always += channels * inner * before**2 + 9 * inner * inner * now**2 + inner * outputs * now**2 + channels * outputs * now**2
        else:
            always += 9 * (channels * inner + inner * inner) * now**2
        ran = torch.ones(now, now)
        for unit in range(1, count + 1):
            if unit > 1:
                if pattern is not None:
                    decided = pattern[f"block{block + 1}_unit{unit}"][0]
                    ran = ran * (decided.view(now, now) if halting == "position" else decided)
                own, wider = int(ran.sum()), dilated(ran)
                first_price = outputs * inner if sizes.bottleneck else 9 * outputs * inner
                optional += first_price * (wider if halting == "position" else own)
                optional += own * (9 * inner * inner + (inner * outputs if sizes.bottleneck else 0))
            if unit < count:
                any_ran = int(ran.any())
                heads += 9 * outputs * int(ran.sum()) + outputs * any_ran if halting == "position" else outputs * any_ran
        channels, before = outputs, now
    return Count(always + channels * classes, optional, heads)


# depth, classes, way of halting, then as the original counts, two per multiply-accumulate: static, everything on, everything halted after unit 1.
PUBLISHED = [
    (32, 10, "position", 137_725_184, 139_790_464, 24_995_296),
    (32, 10, "image", 137_725_184, 137_726_080, None),
    (110, 10, "position", 505_775_360, 514_552_800, 24_995_296),
    (101, 1001, "position", 15_602_814_976, 15_736_541_184, 2_964_692_480),
]
UNITS = {(32, "position"): 5376, (32, "image"): 12, (110, "position"): 22_848, (101, "position"): 13_034}


@pytest.mark.parametrize(("depth", "classes", "halting", "static", "full", "halted"), PUBLISHED)
def test_the_totals_are_the_published_ones_to_the_last_mac(
    depth: int, classes: int, halting: Halting, static: int, full: int, halted: int | None
) -> None:
    side = 224 if depth == 101 else 32
    ledger = price(SACT(depth, classes, halting=halting), torch.zeros(1, 3, side, side))
    heads = ledger.overhead + sum(macs for module, macs in ledger.prices.items() if ".heads." in module)
    assert 2 * ledger.dense == full
    assert 2 * (ledger.dense - heads) == static
    assert halted is None or 2 * ledger.fixed == halted
    # A unit without a change of channels costs the same in every block.
    for block, units in enumerate(Sizes.of(depth, side).units):
        unit = sum(macs for module, macs in ledger.prices.items() if module.startswith(f"blocks.{block}.units.{units - 1}."))
        assert 2 * unit == (436_731_904 if depth == 101 else 9_437_184)
    count = counted(depth, side, classes, halting)
    assert (ledger.dense, heads) == (sum(count), count.heads)
    assert sum(units for name, units in ledger.units.items() if name.count("_") == 1) == UNITS[depth, halting]


@pytest.mark.parametrize(
    ("depth", "halting"), [(50, "image"), pytest.param(152, "image", marks=pytest.mark.slow), pytest.param(200, "position", marks=pytest.mark.slow)]
)
def test_other_depths_cost_what_arithmetic_says(depth: int, halting: Halting) -> None:
    assert price(SACT(depth, 1000, halting=halting), torch.zeros(1, 3, 64, 64)).dense == sum(counted(depth, 64, 1000, halting))


def test_a_position_weighs_four_times_as_much_in_the_next_block() -> None:
    network, image = SACT(32).eval(), torch.zeros(1, 3, 32, 32)
    ledger = price(network, image)
    gates = network(image, "dense").gates
    names = [name for name, gate in gates.items() if gate.follows is None]
    shares = dict(zip(names, ledger.weights(gates).split([1024] * 4 + [256] * 4 + [64] * 4), strict=True))
    last = [shares[f"block{block}_unit5"] for block in (1, 2, 3)]
    assert [float(share[0] / last[0][0]) for share in last] == pytest.approx([1, 4, 16])
    # Followers included: a share is what the gate, its dilated mask and the head behind it cost, over its positions.
    assert float(shares["block1_unit2"][0] * (ledger.dense - ledger.fixed)) == pytest.approx((9_437_184 / 2 + 9 * 16 * 1024 + 16) / 1024)


@pytest.mark.parametrize("halting", KINDS)
@pytest.mark.parametrize(("depth", "side"), [(20, 8), (50, 32)])
def test_four_routes_and_arithmetic_agree(halting: Halting, depth: int, side: int, images: Tensor) -> None:
    for batch in (1, 2, 3) if depth == 20 else (3,):
        routes_agree(unsettled(depth, halting), functional.interpolate(images[:batch], side), 3 if depth == 20 else 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("halting", KINDS)
@pytest.mark.parametrize(("depth", "side", "count"), [(20, 16, 40), (50, 32, 6)])
def test_four_routes_and_arithmetic_agree_on_many_patterns(halting: Halting, depth: int, side: int, count: int, images: Tensor) -> None:
    for batch in (1, 2, 3):
        routes_agree(unsettled(depth, halting), functional.interpolate(images[:batch], side), count)


def routes_agree(network: SACT, images: Tensor, count: int) -> None:
    depth, halting, side = network.arguments["depth"], network.arguments["halting"], images.shape[3]
    ledger = price(network, images[:1])
    for pattern in [None, *patterns(network, images, count)]:
        routes = compare_routes(network, images, ledger, pattern)
        assert routes.agree, routes
        decided = pattern or {name: gate.executed for name, gate in network(images, "skipped").gates.items()}
        single = [{name: units[image : image + 1] for name, units in decided.items()} for image in range(len(images))]
        assert routes.ledger == sum(sum(counted(depth, side, 10, halting, 4, own)) for own in single)


# ---- what it computes ----


class Reference(NamedTuple):
    """What a network written out with functions says."""

    logits: Tensor
    scores: list[Tensor]
    executed: list[Tensor]
    ponder: Tensor


def written_out(network: SACT, images: Tensor, static: bool = False) -> Reference:
    """The network as its paper states it, on the tensors of a state: all states of a block first, then N, R and the average."""
    state, depth, eps = network.state_dict(), network.arguments["depth"], network.arguments["eps"]
    imagenet, spatial = depth == 50, network.arguments["halting"] == "position"
    units = (3, 4, 6, 3) if imagenet else ((depth - 2) // 6,) * 3

    def act(x: Tensor) -> Tensor:
        return x.relu() if imagenet else torch.where(x > 0, x, 0.1 * x)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias"))
        return (x - mean) / (var + (1e-5 if imagenet else 1e-3)).sqrt() * weight + bias

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return functional.conv2d(x, weight, state.get(f"{name}.bias"), stride, weight.shape[2] // 2)

    if imagenet:
        x = functional.max_pool2d(conv(2 * (images - 0.5), "stem.0", 2), 3, 2, 1)
    else:
        mean = images.flatten(1).mean(1).view(-1, 1, 1, 1)
        std = images.flatten(1).std(1, unbiased=False).clamp(min=images[0].numel() ** -0.5).view(-1, 1, 1, 1)
        x = conv((images - mean) / std, "stem.0")
    scores, executed, ponder = [], [], torch.zeros(len(images), dtype=x.dtype)
    for block, count in enumerate(units):
        states, halting, running, mask = [], [], [], torch.ones(())
        cumulative, score = torch.zeros(()), torch.ones(())
        for unit in range(count):
            name, stride = f"blocks.{block}.units.{unit}", 2 if block and not unit else 1
            active = act(norm(x, f"{name}.preactivation.0"))
            if imagenet:
                inner = act(norm(conv(active, f"{name}.convs.0.layers.0"), f"{name}.convs.0.layers.1"))
                inner = act(norm(conv(inner, f"{name}.convs.1.layers.0", stride), f"{name}.convs.1.layers.1"))
                residual = conv(inner, f"{name}.convs.2.layers.0")
                shortcut = x if unit else conv(active, f"{name}.shortcut", stride)
            else:
                inner = act(norm(conv(active, f"{name}.convs.0.layers.0", stride), f"{name}.convs.0.layers.1"))
                residual, shortcut = conv(inner, f"{name}.convs.1.layers.0"), active if unit == block == 0 else x
                if stride == 2:
                    pooled = functional.avg_pool2d(x, 2)
                    shortcut = torch.zeros_like(residual)
                    shortcut[:, pooled.shape[1] // 2 : pooled.shape[1] // 2 + pooled.shape[1]] = pooled
            x = shortcut + (mask if unit and not static else 1) * residual
            head, mean = f"blocks.{block}.heads.{unit}", x.mean((2, 3), keepdim=True)
            if unit == count - 1:
                h = torch.ones(len(images), 1, *(x.shape[2:] if spatial else (1, 1)), dtype=x.dtype)
            elif spatial:
                overall = torch.einsum("bcij,oc->boij", norm(mean, f"{head}.mean_norm"), state[f"{head}.overall.weight"])
                h = torch.sigmoid(conv(norm(x, f"{head}.norm"), f"{head}.local.layers.0") + overall)
            else:
                pooled = norm(mean, f"{head}.norm")
                pooled = (pooled if imagenet else act(pooled)).flatten(1)
                h = torch.sigmoid(pooled @ state[f"{head}.project.weight"].T + state[f"{head}.project.bias"])[:, :, None, None]
            states.append(x)
            halting.append(h)
            running.append(mask.expand_as(h))
            score = torch.where(mask > 0, (1 - h) / (1 - h + eps + cumulative), score)
            cumulative = cumulative + h
            mask = mask * (cumulative < 1 - eps)
            if unit < count - 1:
                scores.append(score.flatten(1))
                executed.append(mask.expand_as(h).flatten(1))
        # N counts the units that ran; a sum stops growing in its position's own time.
        number, average, cost = torch.stack(running).sum(0), torch.zeros_like(x), torch.zeros_like(halting[0])
        for unit in range(count):
            remainder = 1 - sum(halting[:unit], torch.zeros_like(halting[0]))
            average = average + ((unit + 1 < number) * halting[unit] + (unit + 1 == number) * remainder) * states[unit]
            cost = cost + (unit + 1 == number) * (number + remainder)
        ponder = ponder + cost.mean((1, 2, 3))
        x = x if static else average
    features = act(norm(x, "head.0")).mean((2, 3)) if imagenet else act(norm(x.mean((2, 3), keepdim=True), "head.1")).flatten(1)
    return Reference(features @ state["head.4.weight"].T + state["head.4.bias"], scores, executed, ponder)


@pytest.mark.parametrize("halting", KINDS)
@pytest.mark.parametrize("depth", [20, 50])
def test_the_network_is_the_one_written_out(halting: Halting, depth: int, images: Tensor) -> None:
    network = unsettled(depth, halting).double()
    images = (images if depth == 20 else functional.interpolate(images, 64)).double()[:4]
    expected = written_out(network, images)
    with torch.no_grad():
        output = network(images)
        torch.testing.assert_close(network(images, "dense").logits, written_out(network, images, static=True).logits)
        torch.testing.assert_close(network(images, "skipped").logits, expected.logits)
    torch.testing.assert_close(output.logits, expected.logits)
    torch.testing.assert_close(output.aux["ponder"], expected.ponder)
    deciding = [gate for gate in output.gates.values() if gate.follows is None]
    assert len(deciding) == len(expected.scores)
    for gate, score, executed in zip(deciding, expected.scores, expected.executed, strict=True):
        torch.testing.assert_close(gate.score, score)
        assert torch.equal(gate.executed, executed.to(gate.executed))
        assert torch.equal(gate.executed, gate.open.to(gate.executed)), "what halted repeats a closed score, so what a score asks for is what ran"
    rates = [float(executed.mean()) for executed in expected.executed]
    assert sum(0 < rate < 1 for rate in rates) > 1, f"the fixture decides nothing: {rates}"


def test_every_image_is_standardised_by_itself(images: Tensor) -> None:
    images = images.double()
    standard = Standardize()(images)
    assert standard.flatten(1).mean(1).abs().max() < 1e-12
    torch.testing.assert_close(standard.flatten(1).var(1, unbiased=False), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(Standardize()(0.1 + 0.5 * images), standard)
    assert torch.autograd.gradcheck(Standardize(), images[:2, :, :3, :3].clone().requires_grad_())
    faint = 0.5 + 1e-4 * (images - 0.5)
    torch.testing.assert_close(Standardize()(faint), (faint - faint.mean((1, 2, 3), keepdim=True)) * (3 * 16 * 16) ** 0.5)


def test_a_flat_image_has_a_finite_gradient(network: SACT) -> None:
    flat = torch.full((2, 3, 16, 16), 0.5, requires_grad=True)
    output = network(flat)
    check_finite(output)
    (slope,) = torch.autograd.grad(output.logits.sum() + gate_table(output.gates).score.sum(), flat)
    assert bool(torch.isfinite(slope).all())


def test_followers_hold_the_dilated_positions_and_the_images_where_anything_runs(images: Tensor) -> None:
    network = unsettled(20, "position")
    drawn = patterns(network, images, 1)[0]
    drawn["block2_unit2"] *= (torch.rand(7, 64) < 0.1).float()
    drawn["block2_unit2"][3] = 0
    for execution in ("masked", "skipped"):
        with torch.no_grad(), forced(network, drawn):
            gates = network(images, execution).gates
        own, wide, where = (gates[f"block2_unit2{suffix}"] for suffix in ("", "_dilated", "_anywhere"))
        assert [follower.follows for follower in (own, wide, where)] == [None, "block2_unit2", "block2_unit2"]
        assert wide.executed.sum(1).tolist() == [dilated(units.view(8, 8)) for units in own.executed]
        assert bool((wide.executed >= own.executed).all())
        assert torch.equal(where.executed, own.executed.any(1, keepdim=True).float().expand(7, 64))
        assert own.executed[3].sum() == wide.executed[3].sum() == where.executed[3].sum() == 0
        # Decided by the scores, followers ask for what follows from their gate, which a compute target relies on.
        assert torch.equal(wide.open.float(), functional.max_pool2d(own.open.float().view(7, 1, 8, 8), 3, 1, 1).flatten(1))
        assert torch.equal(where.open, own.open.any(1, keepdim=True).expand(7, 64))
    assert gate_table(gates).score.shape == (7, 2 * (256 + 64 + 16))


def test_what_halted_in_a_block_stays_halted_until_the_next(network: SACT, images: Tensor) -> None:
    drawn = patterns(network, images, 1)[0]
    for execution in ("masked", "skipped"):
        with torch.no_grad(), forced(network, drawn):
            gates = network(images, execution).gates
        for block in (1, 2, 3):
            assert torch.equal(gates[f"block{block}_unit2"].executed, drawn[f"block{block}_unit2"])
            assert torch.equal(gates[f"block{block}_unit3"].executed, drawn[f"block{block}_unit2"] * drawn[f"block{block}_unit3"])


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("graph", [False, True])
def test_masked_equals_skipped_for_every_pattern(network: SACT, images: Tensor, batch: int, graph: bool) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        network, images = network.to(memory_format=layout), images.contiguous(memory_format=layout)
        for pattern in patterns(network, images[:batch], 4):
            with torch.set_grad_enabled(graph), forced(network, pattern):
                masked, skipped = network(images[:batch], "masked"), network(images[:batch], "skipped")
            check_finite(skipped)
            torch.testing.assert_close(masked.logits, skipped.logits, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(masked.aux["ponder"], skipped.aux["ponder"])
            for name, gate in masked.gates.items():
                assert torch.equal(gate.executed, skipped.gates[name].executed)


def test_a_halted_unit_is_not_called(network: SACT, images: Tensor) -> None:
    ledger = price(network, images[:1])
    closed = {name: torch.zeros(3, units) for name, units in ledger.units.items() if name.count("_") == 1}
    with torch.no_grad(), forced(network, closed), ExecutionMeter(network, ledger) as meter:
        output = network(images[:3], "skipped")
    assert set(meter.flops.values()) == {0}
    assert ledger(output.gates).tolist() == [ledger.fixed] * 3
    assert ledger.fixed < 0.5 * ledger.dense


@pytest.mark.parametrize("execution", ["masked", "skipped", "dense"])
def test_a_batch_is_its_images_one_by_one(network: SACT, images: Tensor, execution: Execution) -> None:
    with torch.no_grad():
        together, single = network(images, execution), [network(image[None], execution) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in single]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.aux["ponder"], torch.cat([output.aux["ponder"] for output in single]))
    for part, expected in zip(gate_table(together.gates), zip(*(gate_table(output.gates) for output in single), strict=True), strict=True):
        torch.testing.assert_close(part, torch.cat(expected))


def test_the_output_has_one_shape_in_every_execution(network: SACT, images: Tensor) -> None:
    per_image = network.arguments["halting"] == "image"
    for execution in ("masked", "skipped", "dense"):
        output = network(images, execution)
        check_finite(output)
        assert output.logits.shape == (7, 10)
        assert output.aux["ponder"].shape == (7,)
        for name, gate in output.gates.items():
            side = 16 // 2 ** (int(name[5]) - 1)
            assert gate.score.shape == gate.executed.shape == (7, 1 if per_image else side**2)
            assert bool(((gate.score > 0) & (gate.score <= 1)).all())
            assert not gate.executed.requires_grad
            assert execution != "dense" or bool((gate.executed == 1).all())


@pytest.mark.parametrize("halting", KINDS)
def test_odd_sides_work(halting: Halting) -> None:
    network, images = unsettled(14, halting), torch.rand(2, 3, 13, 11)
    ledger = price(network, images[:1])
    for pattern in patterns(network, images, 2):
        assert compare_routes(network, images, ledger, pattern).agree


# ---- what it learns from ----


def test_every_gate_has_a_gradient_at_the_input_of_its_own_image_alone(network: SACT, images: Tensor) -> None:
    images = images[:3].requires_grad_()
    output = network(images)
    for gate in output.gates.values():
        for units in (gate.executed[1] == 0, gate.executed[1] == 1):
            # Also of what had halted before, which repeats the score with which it did.
            if not units.any():
                continue
            (slope,) = torch.autograd.grad(gate.score[1][units].sum(), images, retain_graph=True)
            assert bool(torch.isfinite(slope).all())
            assert slope[1].abs().max() > 0
            assert slope[[0, 2]].abs().max() == 0
    assert not bool(gate_table(output.gates).executed.all())


@pytest.mark.parametrize("halting", KINDS)
def test_units_that_halt_firmly_can_be_attacked(halting: Halting, images: Tensor) -> None:
    network = unsettled(20, halting)
    for name, bias in network.named_parameters():
        if ".heads." in name and name.endswith(("project.bias", "local.layers.0.bias")):
            nn.init.constant_(bias, 30.0)
    images = images[:1].requires_grad_()
    table = gate_table(network(images).gates)
    assert not bool(table.executed.any()), "every halting score is to be 1 in float32, whose sigmoid has no slope there"
    (slope,) = torch.autograd.grad(table.score.log().mean(), images)
    assert slope.abs().max() > 1e-6


def test_no_gradient_runs_through_the_mask(network: SACT, images: Tensor) -> None:
    # Constant decisions of the same values give the same gradient.
    own = network(images[:2].requires_grad_())
    pattern = {name: gate.executed for name, gate in own.gates.items() if gate.follows is None}
    with forced(network, pattern):
        constant = network(images[:2])
    slopes = [
        torch.autograd.grad(output.logits.square().sum() + output.aux["ponder"].sum(), list(network.parameters())) for output in (own, constant)
    ]
    for first, second in zip(*slopes, strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("halting", KINDS)
def test_little_halts_before_training(halting: Halting, images: Tensor) -> None:
    network = SACT(32, halting=halting, width=8)
    biases = [bias for name, bias in network.named_parameters() if ".heads." in name and name.endswith(("project.bias", "local.layers.0.bias"))]
    assert [bias.item() for bias in biases] == [-3.0] * 12
    network(images)
    rates = [gate.executed.mean().item() for gate in network(images).gates.values() if gate.follows is None]
    # The weights of a head spread its scores around 0.047: a few positions reach the bound by the last units.
    assert sum(rates) / 12 > 0.9
    assert rates[0] > 0.99
    convolution = network.blocks[0].units[0].convs[0].layers[0].weight
    assert convolution.std().item() == pytest.approx((2 / (9 * 8)) ** 0.5, rel=0.1)
    assert convolution.abs().max() < 2.3 * (2 / (9 * 8)) ** 0.5


def test_training_lowers_the_loss_and_the_price_of_pondering_lowers_the_flops(network: SACT, images: Tensor) -> None:
    ledger, labels = price(network, images[:1]), torch.arange(7)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    objective, losses, costs = PonderCost(0.1), [], []
    for _ in range(25):
        output = network(images)
        terms = objective(output, labels, ledger)
        losses.append(sum(terms.values()).item())
        costs.append(ledger(output.gates).mean().item())
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        assert all(parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()) for parameter in network.parameters())
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert costs[-1] < costs[0]


def test_scores_are_float32_under_autocast(network: SACT, images: Tensor) -> None:
    for execution in ("masked", "skipped"):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            output = network(images, execution)
        check_finite(output)
        assert {gate.score.dtype for gate in output.gates.values()} == {torch.float32}
        assert output.aux["ponder"].dtype == torch.float32


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 8}, "depth must be 6n . 2 with at least two units per block .* got 8"),
        ({"depth": 33}, "or one of 50, 101, 152, 200, got 33"),
        ({"halting": "channel"}, "halting must be position or image, got 'channel'"),
        ({"eps": 0.0}, r"eps must be in \(0, 1\), got 0.0"),
        ({"eps": 1.0}, "eps must be in"),
        ({"width": 0}, "width must be at least 1 and num_classes at least 2, got 0 and 10"),
        ({"num_classes": 1}, "got 16 and 1"),
    ],
)
def test_a_value_out_of_range_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SACT(**arguments)  # type: ignore[arg-type]


def test_arguments_rebuild_the_network(network: SACT) -> None:
    again = type(network)(**network.arguments)
    again.load_state_dict(network.state_dict())
    assert again.charges == network.charges
    assert isinstance(price(again, torch.zeros(1, 3, 16, 16)), FlopsLedger)
