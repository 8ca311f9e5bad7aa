"""Prices: against a count by hand, and what is refused rather than counted as nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tests.toys import Attention, Blocks, Ungated
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from gatewatt.flops import UnpricedOperator, audit, price
from gatewatt.flops.handles import analyse
from gatewatt.gating import Charge, decision_named
from gatewatt.networks import SkipNet

SMALL = torch.full((1, 3, 8, 8), 0.5)


class Twice(torch.autograd.Function):
    """A user's own operator: fvcore sees a Python call and nothing of what it costs."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return 2 * features

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@torch.library.custom_op("gatewatt_tests::halve", mutates_args=())
def halve(features: Tensor) -> Tensor:
    return features / 2


class Runs(nn.Module):
    """A block of one operator."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, features: Tensor) -> Tensor:
        return self.operator(features)


def snapshot(network: nn.Module) -> dict[str, Any]:
    """Everything that a measurement must not change."""
    return {
        "state": {name: tensor.numpy().tobytes() for name, tensor in network.state_dict().items()},
        "training": [module.training for module in network.modules()],
        "requires_grad": [parameter.requires_grad for parameter in network.parameters()],
        "grad": [parameter.grad for parameter in network.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
        "random": torch.get_rng_state().tolist(),
    }


# ---- what things cost ----


def test_prices_by_hand() -> None:
    ledger = price(Blocks(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)), SMALL)
    assert ledger.prices == {"blocks.0": 3 * 3 * 9 * 64, "blocks.1": 3 * 3 * 64}
    assert ledger.overhead == 3 * 2
    assert ledger.fixed == 3 * 2 + 3 * 10  # gates and head
    assert ledger.dense == ledger.fixed + 3 * 3 * 10 * 64
    assert ledger.resolution == (8, 8)
    assert ledger.units == {"block0": 1, "block1": 1}


def test_prices_hold_for_the_resolution_of_the_example() -> None:
    ledger = price(Blocks(nn.Conv2d(3, 3, 1)), torch.zeros(1, 3, 4, 6))
    assert ledger.prices["blocks.0"] == 3 * 3 * 4 * 6
    assert ledger.resolution == (4, 6)


def test_fused_attention_has_its_price() -> None:
    positions = 64
    projections = positions * (3 * 5 + 3 * 5 + 3 * 3)
    products = positions * positions * 5 + positions * positions * 3  # query times key, weights times value
    assert price(Blocks(Attention()), SMALL).prices["blocks.0"] == projections + products


def test_fused_attention_costs_what_its_two_matrix_products_cost() -> None:
    query, key, value = torch.rand(2, 4, 10, 6), torch.rand(2, 4, 7, 6), torch.rand(2, 4, 7, 9)

    class Fused(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return scaled_dot_product_attention(query, key, value)

    with FlopCounterMode(display=False) as counter:
        torch.softmax(query @ key.transpose(2, 3) / 6**0.5, dim=-1) @ value
    assert analyse(Fused(), (query, key, value)).total() == counter.get_total_flops() // 2 == 2 * 4 * 10 * 7 * (6 + 9)


@pytest.mark.parametrize("training", [True, False])
def test_the_price_does_not_depend_on_mode_decision_or_autocast(training: bool) -> None:
    images = torch.rand(1, 3, 16, 16)
    expected = price(SkipNet(8, width=4).eval(), images)
    network = SkipNet(8, width=4, decision="sampled").train(training)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert price(network, images) == expected
        assert audit(network, images) <= expected.dense


# ---- what is refused ----


@pytest.mark.parametrize(
    ("operator", "name"),
    [(lambda features: torch.fft.fft2(features).real, "aten::fft_fft2"), (halve, "gatewatt_tests::halve"), (Twice.apply, "Twice")],
    ids=["fft", "custom operator", "autograd function"],
)
def test_an_operator_without_a_price_is_named_with_its_module(operator: Any, name: str) -> None:
    network = Blocks(nn.Conv2d(3, 3, 1), Runs(operator))
    with pytest.raises(UnpricedOperator, match=rf"{name}.* in '.*blocks\.1' has no FLOP formula; add one in flops/handles.py"):
        price(network, SMALL)
    with torch.no_grad():
        network.scores.bias.fill_(9.0)
    with pytest.raises(UnpricedOperator, match=rf"{name}.* in '.*blocks\.1'"):
        audit(network, SMALL)


def test_a_batch_has_no_price() -> None:
    with pytest.raises(ValueError, match=r"price takes one image, shape \(1, 3, H, W\), got a batch of 2"):
        price(Blocks(nn.Conv2d(3, 3, 1)), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 8, 8), torch.nan), "images must be finite; image 0"),
        (torch.full((1, 3, 8, 8), 255.0), r"images must be in \[0, 1\]; image 0 of the batch spans 255 to 255"),
        (torch.zeros(3, 8, 8), r"shape \(B, 3, H, W\)"),
        (torch.zeros(1, 1, 8, 8), r"got \(1, 1, 8, 8\)"),
    ],
    ids=["nan", "bytes as floats", "no batch axis", "grey"],
)
@pytest.mark.parametrize("measure", [price, audit])
def test_what_is_no_image_has_no_price(measure: Any, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(Blocks(nn.Conv2d(3, 3, 1)), images)


def test_a_network_without_gates_has_no_price() -> None:
    with pytest.raises(ValueError, match="returned no gates"):
        price(Ungated(), SMALL)


def test_a_charge_on_a_module_that_does_not_run_is_refused() -> None:
    network = Blocks(nn.Conv2d(3, 3, 1))
    network.spare = nn.Conv2d(3, 3, 1)
    network.charges = (*network.charges, Charge("spare", ("block0",)))
    with pytest.raises(ValueError, match=r"module 'spare' is charged to \('block0',\) but ran nothing that costs FLOPs"):
        price(network, SMALL)


def test_a_charge_on_a_module_that_costs_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="module 'blocks.0' .* ran nothing that costs FLOPs"):
        price(Blocks(nn.ReLU()), SMALL)


@pytest.mark.parametrize(("module", "message"), [("blocks.0", "charged twice"), ("blocks.0.0", "inside 'blocks.0', which is charged too")])
def test_no_module_is_paid_twice(module: str, message: str) -> None:
    network = Blocks(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)))
    network.charges = (*network.charges, Charge(module, ("block0",)))
    with pytest.raises(ValueError, match=message):
        price(network, SMALL)


# ---- what is left alone ----


@pytest.mark.parametrize("measure", [price, audit])
@pytest.mark.parametrize("operator", [None, lambda features: torch.fft.fft2(features).real], ids=["measured", "raises"])
def test_measuring_leaves_the_network_and_the_random_state_alone(measure: Any, operator: Any) -> None:
    network = Blocks(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5)), nn.Conv2d(3, 3, 1))
    network.train()
    network.blocks[1].eval()
    network.head.requires_grad_(False)
    network.decision = decision_named("sampled")
    with torch.no_grad():
        network.scores.bias.fill_(9.0)
    if operator is not None:
        network.blocks[1] = Runs(operator).eval()
    before, decision = snapshot(network), network.decision
    with contextlib.nullcontext() if operator is None else pytest.raises(UnpricedOperator):
        measure(network, SMALL)
    assert snapshot(network) == before
    assert network.decision is decision
