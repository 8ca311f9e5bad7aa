"""The proof: independent routes to the FLOPs of a pass that really skipped, which agree to the last one."""

from __future__ import annotations

import pytest
import torch
from tests.toys import Attention, Blocks, gate
from torch import Tensor, nn

from gatewatt.flops import ExecutionMeter, audit, audit_dispatched, compare_routes, price, random_patterns
from gatewatt.flops.handles import analyse
from gatewatt.gating import DynamicNetwork, DynamicOutput, Execution, forced
from gatewatt.networks import SkipNet
from gatewatt.networks.skipnet import GateKind


def counted(depth: int, side: int, width: int, pattern: dict[str, Tensor]) -> int:
    """MACs of a forced SkipNet with recurrent gates, by arithmetic alone, summed over the batch."""
    per_group, images = (depth - 2) // 6, len(next(iter(pattern.values())))
    total, channels = images * 3 * width * 9 * side**2, width
    for index in range(3 * per_group):
        group = index // per_group
        outputs, pixels = width * 2**group, (side // 2**group) ** 2
        opened = images if index == 0 else int(pattern[f"block{index}"].sum())
        total += opened * 9 * pixels * (channels * outputs + outputs * outputs)
        if channels != outputs:
            total += images * channels * outputs * pixels
        if index:
            # The gate reads the features before the block: embedding, the four gates of the LSTM, projection.
            total += images * (channels * 10 + 40 * (10 + 10) + 10)
        channels = outputs
    return total + images * channels * 10


def closed(network: DynamicNetwork, images: int, value: float = 0.0) -> dict[str, Tensor]:
    return {name: torch.full((images, 1), value) for name in (charge.gates[0] for charge in network.charges)}


# ---- the routes agree ----


def test_four_routes_and_arithmetic_agree_on_200_random_patterns(images: Tensor) -> None:
    images = images[:, :, :16, :16].contiguous()
    for depth, batch, count in [(8, 1, 20), (8, 7, 120), (14, 1, 30), (14, 3, 30)]:
        network = SkipNet(depth, width=4).eval()
        ledger = price(network, images[:1])
        for pattern in random_patterns(network, images[:batch], count, seed=batch):
            routes = compare_routes(network, images[:batch], ledger, pattern)
            assert routes.agree
            assert routes.ledger == routes.traced == routes.dispatched == routes.hooked == counted(depth, 16, 4, pattern)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_routes_and_arithmetic_agree_on_1000_random_patterns_of_skipnet_38() -> None:
    network, images = SkipNet(38).eval(), torch.rand(3, 3, 32, 32)
    ledger = price(network, images[:1])
    for batch, count in [(1, 700), (3, 300)]:
        for pattern in random_patterns(network, images[:batch], count, seed=batch):
            routes = compare_routes(network, images[:batch], ledger, pattern)
            assert routes.agree
            assert routes.ledger == routes.traced == routes.dispatched == routes.hooked == counted(38, 32, 16, pattern)


@pytest.mark.parametrize("kind", ["feedforward1", "feedforward2"])
def test_four_routes_agree_with_feedforward_gates(kind: GateKind, images: Tensor) -> None:
    network, images = SkipNet(8, width=4, gate=kind).eval(), images[:3]
    ledger = price(network, images[:1])
    for pattern in random_patterns(network, images, 5):
        assert compare_routes(network, images, ledger, pattern).agree


def test_four_routes_agree_with_fused_attention(images: Tensor) -> None:
    network, images = Blocks(Attention(), nn.Conv2d(3, 3, 3, padding=1)).eval(), images[:3, :, :8, :8].contiguous()
    ledger = price(network, images[:1])
    for pattern in random_patterns(network, images, 6):
        assert compare_routes(network, images, ledger, pattern).agree


def test_routes_agree_when_the_gates_decide(network: SkipNet, images: Tensor) -> None:
    ledger = price(network, images[:1])
    routes = compare_routes(network, images, ledger)
    assert routes.agree
    assert routes.ledger == ledger(network(images).gates).sum().item()


def test_a_wrong_price_is_found_out(network: SkipNet, images: Tensor) -> None:
    ledger = price(network, images[:1])
    prices = {**ledger.prices, "trunk.blocks.1.residual": ledger.prices["trunk.blocks.1.residual"] + 1}
    dear = type(ledger)(prices, ledger.charges, ledger.dense, ledger.fixed, ledger.overhead, ledger.resolution, ledger.units)
    assert not compare_routes(network, images, dear, closed(network, len(images), 1.0)).agree


def test_random_patterns_reach_every_unit_and_leave_the_random_state_alone(network: SkipNet, images: Tensor) -> None:
    before = torch.get_rng_state()
    patterns = random_patterns(network, images, 40, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("block1", "block2"):
        drawn = torch.stack([pattern[name] for pattern in patterns])
        assert drawn.shape == (40, 7, 1)
        assert drawn.unique().tolist() == [0.0, 1.0]
        assert drawn.mean(0).min() > 0
        assert drawn.mean(0).max() < 1
    again, other = random_patterns(network, images, 40, seed=3), random_patterns(network, images, 40, seed=4)
    assert all(torch.equal(first[name], second[name]) for first, second in zip(patterns, again, strict=True) for name in first)
    assert any(not torch.equal(first[name], second[name]) for first, second in zip(patterns, other, strict=True) for name in first)


# ---- the audit ----


@pytest.mark.parametrize("measure", [audit, audit_dispatched])
def test_a_batch_costs_what_its_images_cost(measure: object, network: SkipNet, images: Tensor) -> None:
    assert callable(measure)
    single = [measure(network, image[None]) for image in images]
    assert len(set(single)) > 1
    assert measure(network, images) == sum(single)
    assert single == price(network, images[:1])(network(images).gates).tolist()


class LogitsAlone(nn.Module):
    """A forward that returns no score."""

    def __init__(self, network: DynamicNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images, "skipped").logits


@pytest.mark.parametrize(
    ("kind", "gates", "dropped"),
    [
        # Channels of the features times embedding, the LSTM's four gates, projection; the LSTM is kept because it works in place.
        ("recurrent", (4 * 10 + 40 * 20 + 10) + (8 * 10 + 40 * 20 + 10), 10 + 10),
        # A strided convolution on half the side, then two classes.
        ("feedforward2", (4 * 4 * 9 * 16**2 + 4 * 2) + (8 * 8 * 9 * 8**2 + 8 * 2), None),
    ],
)
def test_gates_that_only_steer_control_flow_are_counted(kind: GateKind, gates: int, dropped: int | None, images: Tensor) -> None:
    network = SkipNet(8, width=4, gate=kind).eval()
    trunk = counted(8, 32, 4, closed(network, 1)) - (4 * 10 + 40 * 20 + 10) - (8 * 10 + 40 * 20 + 10)
    with torch.no_grad(), forced(network, closed(network, 1)):
        assert audit(network, images[:1]) == trunk + gates
        # Decided in Python, the scores are in no result, and a trace drops what computed them.
        assert analyse(LogitsAlone(network), (images[:1],)).total() == trunk + gates - (gates if dropped is None else dropped)
    assert price(network, images[:1]).overhead == gates


# ---- what really ran ----


@pytest.mark.parametrize("execution", ["masked", "dense"])
def test_the_meter_counts_everything_where_everything_runs(network: SkipNet, images: Tensor, execution: str) -> None:
    ledger = price(network, images[:1])
    with torch.no_grad(), forced(network, closed(network, len(images))), ExecutionMeter(network, ledger) as meter:
        network(images, execution)
    assert meter.images == 7
    assert meter.flops == {module: 7 * macs for module, macs in ledger.prices.items()}
    assert meter.total == 7 * ledger.dense


def test_the_meter_counts_the_rows_that_entered(network: SkipNet, images: Tensor) -> None:
    ledger = price(network, images[:1])
    pattern = {"block1": torch.tensor([[1.0], [0.0], [1.0]]), "block2": torch.zeros(3, 1)}
    with torch.no_grad(), forced(network, pattern), ExecutionMeter(network, ledger) as meter:
        network(images[:3], "skipped")
    first, second = ledger.prices
    assert meter.flops == {first: 2 * ledger.prices[first], second: 0}
    assert meter.total == 3 * ledger.fixed + 2 * ledger.prices[first]


def test_the_meter_adds_up_over_several_blocks_and_sees_nothing_outside(network: SkipNet, images: Tensor) -> None:
    ledger = price(network, images[:1])
    meter = ExecutionMeter(network, ledger)
    with torch.no_grad():
        for part in (images[:2], images[2:]):
            with meter:
                network(part, "skipped")
            network(part, "masked")
    assert meter.images == 7
    assert meter.total == audit(network, images)
    meter.reset()
    assert (meter.images, meter.total) == (0, 0)


def test_the_meter_leaves_no_hook_behind(network: SkipNet, images: Tensor) -> None:
    with pytest.raises(RuntimeError, match="boom"), ExecutionMeter(network, price(network, images[:1])):
        raise RuntimeError("boom")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_module_that_runs_parts_of_images_says_how_much(images: Tensor) -> None:
    class Rows(nn.Linear):
        """A linear layer over the rows of an image, which can be handed some rows of some images."""

        def extent(self, rows: Tensor) -> tuple[int, int]:
            return rows.shape[:-1].numel(), 8

    class Half(Blocks):
        """Its block runs for the upper half of an image."""

        def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
            ran = self.blocks[0](images[:, 0] if execution == "dense" else images[:, 0, :4])
            return DynamicOutput(self.head(images.mean((2, 3))) + ran.sum((1, 2))[:, None], {"block0": gate([[1.0]] * len(images))})

    network, images = Half(Rows(8, 2, bias=False)), images[:3, :, :8, :8]
    meter = ExecutionMeter(network, price(network, images[:1]))
    with meter:
        network(images, "skipped")
    assert meter.flops == {"blocks.0": 3 * 4 * 8 * 2}
