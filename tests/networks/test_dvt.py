"""DVT against an analytic count, a cascade written out with functions, and itself in its other executions."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import adaptive_avg_pool2d, conv2d, gelu, interpolate, layer_norm, linear

from gatewatt.flops import compare_routes, price, random_patterns
from gatewatt.flops.handles import analyse
from gatewatt.gating import Execution, check_finite, forced, gate_table
from gatewatt.networks.dvt import DVT, LAYOUTS, BackboneName, Handover, Resampling, Stage
from gatewatt.networks.t2t import Performer, sinusoids

TINY = {"dim": 16, "depth": 2, "heads": 2}
SIZES: dict[str, int] = {"small-32": 32, "deit-s": 48, "t2t-12": 64, "compact-32": 32}
"""Backbones and an image size at which their tiny variants have several patches in every stage."""


def tiny(backbone: BackboneName = "small-32", **arguments: Any) -> DVT:
    """An untrained network in eval mode that has opinions, so that its gates tell images apart."""
    torch.manual_seed(3)
    network = DVT(backbone, 10, **{**TINY, **arguments})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "head" in name:
                parameter.mul_(30)
            else:
                parameter.mul_(3)
    return network.eval()


@pytest.fixture
def network(images: Tensor) -> DVT:
    """Thresholds at the median doubt: about half of the images leave at exit 1, half of the others at exit 2."""
    network = tiny()
    with torch.no_grad():
        doubts = 1 - network(images).exits.softmax(2).amax(2)
        going = doubts[:, 0] > doubts[:, 0].median()
        network.doubt.copy_(torch.stack([doubts[:, 0].median() + 1e-4, doubts[going, 1].median() + 1e-4]))
    return network


def sized(backbone: str, count: int = 3) -> Tensor:
    """Images at which every stage of a tiny variant has several patches."""
    return torch.rand(count, 3, SIZES[backbone], SIZES[backbone])


# ---- what it costs ----


class Size(NamedTuple):
    """A backbone as the specification's section 7.1 prints it, and the last columns of its table in 7.2 (in G)."""

    dim: int
    depth: int
    heads: int
    ratio: int
    t2t: bool
    stages: tuple[str, str, str]
    cumulative: tuple[str, str, str]
    reuse: tuple[str, str]
    plain: str


TABLE: dict[BackboneName, Size] = {
    "t2t-12": Size(256, 12, 4, 2, True, ("0.468", "0.978", "2.009"), ("0.468", "1.446", "3.455"), ("0.058", "0.188"), "1.763"),
    "t2t-14": Size(384, 14, 6, 3, True, ("1.201", "2.618", "5.446"), ("1.201", "3.818", "9.264"), ("0.145", "0.510"), "4.783"),
    "deit-s": Size(384, 12, 6, 4, False, ("1.143", "2.500", "5.157"), ("1.143", "3.643", "8.801"), ("0.111", "0.384"), "4.599"),
}
MEASURED: dict[BackboneName, tuple[int, int, int]] = {
    "t2t-12": (467_702_400, 977_928_864, 2_008_449_024),
    "t2t-14": (1_200_582_272, 2_616_761_888, 5_445_258_848),
    "deit-s": (1_142_909_952, 2_499_569_664, 5_156_822_400),
}
PLAIN: dict[BackboneName, int] = {"t2t-12": 1_762_638_336, "t2t-14": 4_783_468_544, "deit-s": 4_598_882_304}


def front(size: Size, side: int, kernel: int, middle: int, patches: int) -> int:
    """MACs of the patch embedding at 224 pixels: one convolution, or two performers and a projection."""
    if not size.t2t:
        return 3 * kernel**2 * size.dim * patches**2
    macs = 0
    for tokens, channels in ((side**2, 3 * kernel**2), (middle**2, 64 * 9)):
        macs += tokens * channels * 3 * 64  # key, query, value
        macs += tokens * 2 * 64 * 32  # features of keys and queries
        macs += tokens * (2 * 64 * 32 + 32)  # keys with values, queries with those, normalisation
        macs += tokens * 3 * 64 * 64  # projection and MLP
    return macs + patches**2 * 64 * 9 * size.dim


GEOMETRY = [((28, 14, 14), 32, 7), ((38, 11, 19), 23, 10), ((56, 7, 28), 16, 14)]
"""Of each stage: first grid, first kernel and second grid of the T2T front; kernel of DeiT; patches along a side."""


def counted(size: Size, stage: int, *, reuse: bool = True, class_token: bool = False) -> tuple[int, int]:
    """MACs of a stage, and of its reuse modules alone; ``class_token`` if feature reuse transforms the class token too, as in the original."""
    (side, kernel, middle), deit_kernel, patches = GEOMETRY[stage]
    embedding = front(size, side, kernel if size.t2t else deit_kernel, middle, patches)
    tokens, dim, hidden = patches**2 + 1, size.dim, size.ratio * size.dim
    context = 48 if reuse and stage else 0
    block = tokens * (3 * dim * dim + dim * dim + (dim + context) * hidden + hidden * dim) + 2 * tokens**2 * dim
    reused = 0
    if context:
        upstream, maps = GEOMETRY[stage - 1][2] ** 2, size.depth * size.heads
        reused = size.depth * (upstream + class_token) * (dim * 128 + 128 * 48) + 2 * (upstream + 1) ** 2 * maps * 3 * maps
    return embedding + size.depth * block + dim * 1000 + reused, reused


def printed(macs: int) -> str:
    """As the specification's table has it."""
    return f"{macs / 1e9:.3f}"


@pytest.mark.parametrize("backbone", TABLE)
def test_the_analytic_count_is_the_specification(backbone: BackboneName) -> None:
    size = TABLE[backbone]
    original = [counted(size, stage, class_token=True) for stage in range(3)]
    assert tuple(printed(stage) for stage, _ in original) == size.stages
    # A last digit can differ by one where the table adds up rounded figures.
    for macs, total in zip(itertools.accumulate(stage for stage, _ in original), size.cumulative, strict=True):
        assert macs / 1e9 == pytest.approx(float(total), abs=0.0011)
    assert tuple(printed(reuse) for _, reuse in original[1:]) == size.reuse
    assert printed(counted(size, 2, reuse=False)[0]) == size.plain


@pytest.mark.parametrize("backbone", TABLE)
def test_the_price_list_is_the_analytic_count_to_the_last_mac(backbone: BackboneName) -> None:
    ledger = price(DVT(backbone), torch.zeros(1, 3, 224, 224))
    measured = (ledger.fixed, *ledger.prices.values())
    assert measured == MEASURED[backbone] == tuple(counted(TABLE[backbone], stage)[0] for stage in range(3))
    assert ledger.dense == sum(MEASURED[backbone])
    assert ledger.overhead == 0
    for total, expected in zip(itertools.accumulate(measured), TABLE[backbone].cumulative, strict=True):
        assert total / 1e9 == pytest.approx(float(expected), rel=0.02)


class Logits(nn.Module):
    """A stage of its own, tensors in and out."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.stage(images)[0]


@pytest.mark.parametrize("backbone", TABLE)
def test_without_reuse_the_last_stage_is_the_plain_backbone(backbone: BackboneName) -> None:
    plain = Stage(LAYOUTS[backbone], 2, 1000, feature_reuse=False, relation_reuse=False, drop_path=0.0).eval()
    with torch.no_grad():
        macs = analyse(Logits(plain), (torch.zeros(1, 3, 224, 224),)).total()
    assert macs == PLAIN[backbone] == counted(TABLE[backbone], 2, reuse=False)[0]
    # T2T-ViT-12, T2T-ViT-14 and DeiT-S as published, in G.
    assert macs / 1e9 == pytest.approx({"t2t-12": 1.78, "t2t-14": 4.80, "deit-s": 4.6}[backbone], rel=0.02)


def test_the_small_variant_costs_three_skipnets_38() -> None:
    ledger = price(DVT("small-32", 10), torch.zeros(1, 3, 32, 32))
    assert (ledger.fixed, *ledger.prices.values()) == (31_338_624, 76_975_896, 141_827_160)


def test_the_compact_variant_is_a_cascade_behind_two_convolutions_a_stage() -> None:
    """Each stage against the same transformer without its convolutions, plus these by hand: 3x3, 3 to 48 and 48 to 48 channels at 16x16."""
    ledger = price(DVT("compact-32", 10), torch.zeros(1, 3, 32, 32))
    without = price(DVT("small-32", 10, dim=96, depth=4, heads=2), torch.zeros(1, 3, 32, 32))
    convolutions = 9 * (3 + 48) * 48 * 16**2
    for (dense, plain), tokens, window in zip(
        zip((ledger.fixed, *ledger.prices.values()), (without.fixed, *without.prices.values()), strict=True), (16, 36, 64), (8, 6, 4), strict=True
    ):
        embedding = 96 * tokens * (48 * (window // 2) ** 2 - 3 * window**2)
        assert dense == plain + convolutions + embedding


# ---- the routes agree ----


@pytest.mark.parametrize(("batch", "count"), [(1, 30), (2, 30), (3, 40)])
def test_four_routes_agree_on_100_random_patterns(images: Tensor, batch: int, count: int) -> None:
    network, images = tiny(dim=8, depth=1), images[:batch, :, :16, :16].contiguous()
    ledger, seen = price(network, images[:1]), set()
    for pattern in random_patterns(network, images, count, seed=batch):
        routes = compare_routes(network, images, ledger, pattern)
        assert routes.agree
        seen.add(routes.ledger)
    prices = list(ledger.prices.values())
    levels = (ledger.fixed, ledger.fixed + prices[0], ledger.dense)
    assert seen <= {sum(costs) for costs in itertools.product(levels, repeat=batch)}
    assert len(seen) >= 3


@pytest.mark.parametrize("backbone", ["deit-s", "t2t-12", "compact-32"])
def test_four_routes_agree_for_the_other_backbones(backbone: BackboneName) -> None:
    network, images = tiny(backbone, depth=1), sized(backbone)
    ledger = price(network, images[:1])
    for pattern in random_patterns(network, images, 6):
        assert compare_routes(network, images, ledger, pattern).agree


@pytest.mark.parametrize("reuse", [(False, False), (True, False), (False, True)])
def test_four_routes_agree_without_reuse(reuse: tuple[bool, bool], images: Tensor) -> None:
    network = tiny(depth=1, feature_reuse=reuse[0], relation_reuse=reuse[1])
    ledger = price(network, images[:1])
    for pattern in random_patterns(network, images[:2], 2):
        assert compare_routes(network, images[:2], ledger, pattern).agree


def test_routes_agree_when_the_gates_decide(network: DVT, images: Tensor) -> None:
    ledger = price(network, images[:1])
    routes = compare_routes(network, images, ledger)
    assert routes.agree
    with torch.no_grad():
        flops = ledger(network(images).gates)
    assert routes.ledger == flops.sum().item()
    assert sorted(set(flops.tolist())) == [ledger.fixed, ledger.fixed + ledger.prices["stages.1"], ledger.dense]


@pytest.mark.parametrize(("backbone", "size"), [("small-32", 80), ("deit-s", 80), ("t2t-12", 32)])
def test_images_of_another_size_are_priced_too(backbone: BackboneName, size: int) -> None:
    network, images = tiny(backbone, depth=1), torch.rand(2, 3, size, size)
    ledger = price(network, images[:1])
    pattern = {"exit1": torch.tensor([[1.0], [1.0]]), "exit2": torch.tensor([[0.0], [1.0]])}
    assert compare_routes(network, images, ledger, pattern).agree


# ---- what it computes ----


def finer(patches: Tensor, target: int, multiple: int) -> Tensor:
    """Maps (N, C, s, s) to (N, C, target, target), the way the original does it."""
    return adaptive_avg_pool2d(interpolate(patches, scale_factor=float(multiple), mode="nearest"), target)


@pytest.mark.parametrize(("source", "target", "multiple"), [(7, 10, 2), (10, 14, 2), (4, 6, 3), (6, 8, 4), (3, 3, 2), (1, 2, 2), (1, 5, 2)])
def test_resampling_is_nearest_upsampling_and_adaptive_averaging(source: int, target: int, multiple: int) -> None:
    maps = torch.randn(2, source * source, 5, dtype=torch.float64)
    found = Resampling(source, target, multiple).double()(maps, 1, (source, source), (target, target))
    expected = finer(maps.transpose(1, 2).unflatten(2, (source, source)), target, multiple).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    kept_for_others = Resampling(2, 2, multiple).double()(maps, 1, (source, source), (target, target))
    torch.testing.assert_close(kept_for_others, expected, rtol=1e-6, atol=1e-6)


def test_resampling_keeps_rows_and_columns_apart() -> None:
    maps = torch.randn(1, 4, 7 * 5, 3)
    found = Resampling(7, 10, 2)(maps, 2, (7, 5), (10, 6))
    planes = maps.transpose(2, 3).flatten(0, 1).unflatten(2, (7, 5))
    expected = adaptive_avg_pool2d(interpolate(planes, scale_factor=2.0, mode="nearest"), (10, 6))
    torch.testing.assert_close(found, expected.flatten(2).unflatten(0, (1, 4)).transpose(2, 3))


def test_a_coarser_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="a stage has 3 patches along a side and the one before it 4; give images of another size"):
        Resampling(4, 3, 2)


def relation_maps(maps: Tensor, source: int, target: int, multiple: int) -> Tensor:
    """Attention maps (B, M, T, T) for the finer grid, one token axis after the other."""
    for _ in range(2):
        first, patches = maps[..., :1], maps[..., 1:]
        planes = finer(patches.reshape(-1, 1, source, source), target, multiple)
        maps = torch.cat([first, planes.reshape(*patches.shape[:3], target**2)], dim=3).transpose(2, 3)
    return maps


def performer(state: dict[str, Tensor], patches: Tensor) -> Tensor:
    """A block of the T2T front, in the form of its paper."""
    normed = layer_norm(patches, patches.shape[2:], state["norm1.weight"], state["norm1.bias"])
    key, query, value = linear(normed, state["kqv.weight"], state["kqv.bias"]).chunk(3, dim=2)
    w = state["directions"]
    kernels = [torch.exp(torch.einsum("bti,mi->btm", x, w) - (x**2).sum(2)[..., None] / 2) / math.sqrt(32) for x in (query, key)]
    weights = torch.einsum("bqm,bkm->bqk", *kernels)
    attended = torch.einsum("bqk,bkc->bqc", weights / (weights.sum(2, keepdim=True) + 1e-8), value)
    tokens = value + linear(attended, state["projection.weight"], state["projection.bias"])
    normed = layer_norm(tokens, (64,), state["norm2.weight"], state["norm2.bias"])
    hidden = gelu(linear(normed, state["mlp.0.weight"], state["mlp.0.bias"]))
    return tokens + linear(hidden, state["mlp.2.weight"], state["mlp.2.bias"])


def part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")}


def written_out(network: DVT, backbone: str, images: Tensor) -> list[Tensor]:
    """Logits of the three exits by functions on the tensors of the network's state, head by head."""
    t2t, depth, heads = backbone.startswith("t2t"), TINY["depth"], TINY["heads"]
    windows = {
        "small-32": [(8, 8, 0), (6, 6, 2), (4, 4, 0)],
        "compact-32": [(4, 4, 0), (3, 3, 1), (2, 2, 0)],  # of what two convolutions leave
        "deit-s": [(32, 32, 0), (23, 23, 3), (16, 16, 0)],
        "t2t-12": [(14, 8, 3), (11, 6, 5), (7, 4, 2)],
    }[backbone]
    multiples = {"small-32": (0, 3, 4), "compact-32": (0, 3, 4)}.get(backbone, (0, 2, 2))
    eps = 1e-5 if t2t else 1e-6
    mean, std = {32: ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])}.get(images.shape[-1], ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    logits, left = [], None
    for index, (kernel, stride, padding) in enumerate(windows):
        state = part(network.state_dict(), f"stages.{index}")
        if t2t:
            features = pixels
            for name, window in (("embed.first", (kernel, stride, padding)), ("embed.second", (3, 2, 1)), ("embed.projection", (3, 2, 1))):
                patches = functional.unfold(features, window[0], stride=window[1], padding=window[2]).transpose(1, 2)
                here = part(state, name)
                tokens = linear(patches, here["weight"], here["bias"]) if name.endswith("projection") else performer(here, patches)
                side = round(math.sqrt(tokens.shape[1]))
                features = tokens.transpose(1, 2).reshape(len(images), -1, side, side)
            positions = sinusoids(side**2 + 1, TINY["dim"])
        else:
            features, here = pixels, part(state, "embed")
            if backbone == "compact-32":
                for first, halving in ((0, 2), (3, 1)):
                    norm = part(here, f"0.{first + 1}")
                    features = conv2d(features, here[f"0.{first}.weight"], None, halving, 1)
                    features = (features - norm["running_mean"].view(-1, 1, 1)) / (norm["running_var"] + 1e-5).sqrt().view(-1, 1, 1)
                    features = (features * norm["weight"].view(-1, 1, 1) + norm["bias"].view(-1, 1, 1)).clamp_min(0)
                here = part(here, "1")
            features = conv2d(features, here["weight"], here["bias"], stride, padding)
            side, positions = features.shape[-1], state["positions.table"]
            if positions.shape[1] != side**2 + 1:
                native = round(math.sqrt(positions.shape[1] - 1))
                table = positions[:, 1:].transpose(1, 2).reshape(1, -1, native, native)
                table = interpolate(table, (side, side), mode="bilinear").flatten(2).transpose(1, 2)
                positions = torch.cat([positions[:, :1], table], dim=1)
        x = torch.cat([state["class_token"].expand(len(images), -1, -1), features.flatten(2).transpose(1, 2)], dim=1) + positions
        summand = 0 * x.new_zeros(1, depth * heads, 1, 1)
        if left is not None:
            mixed = conv2d(left.relations, state["relation_reuse.mix.0.weight"], state["relation_reuse.mix.0.bias"])
            mixed = conv2d(gelu(mixed), state["relation_reuse.mix.2.weight"], state["relation_reuse.mix.2.bias"])
            summand = relation_maps(mixed, left.grid[0], side, multiples[index])
        maps = []
        for layer in range(depth):
            block = part(state, f"blocks.{layer}")
            normed = layer_norm(x, x.shape[2:], block["norm1.weight"], block["norm1.bias"], eps)
            query, key, value = linear(normed, block["attention.qkv.weight"], block.get("attention.qkv.bias")).chunk(3, dim=2)
            attended = []
            for head in range(heads):
                q, k, v = (tensor.chunk(heads, dim=2)[head] for tensor in (query, key, value))
                maps.append(q @ k.transpose(1, 2) / math.sqrt(q.shape[2]) + summand[:, layer * heads + head])
                attended.append(maps[-1].softmax(2) @ v)
            x = x + linear(torch.cat(attended, dim=2), block["attention.projection.weight"], block["attention.projection.bias"])
            seen = x
            if left is not None:
                context = layer_norm(left.tokens, x.shape[2:], block["reuse.transform.0.weight"], block["reuse.transform.0.bias"], eps)
                context = gelu(linear(context, block["reuse.transform.1.weight"], block["reuse.transform.1.bias"]))
                context = linear(context, block["reuse.transform.3.weight"], block["reuse.transform.3.bias"])[:, 1:]
                context = finer(context.transpose(1, 2).unflatten(2, left.grid), side, multiples[index]).flatten(2).transpose(1, 2)
                seen = torch.cat([x, torch.cat([x.new_zeros(len(x), 1, 48), context], dim=1)], dim=2)
            normed = layer_norm(seen, seen.shape[2:], block["norm2.weight"], block["norm2.bias"], eps)
            hidden = gelu(linear(normed, block["mlp.0.weight"], block["mlp.0.bias"]))
            x = x + linear(hidden, block["mlp.2.weight"], block["mlp.2.bias"])
        normed = layer_norm(x, x.shape[2:], state["norm.weight"], state["norm.bias"], eps)[:, 0]
        logits.append(linear(normed, state["head.weight"], state["head.bias"]))
        left = Handover(x, torch.stack(maps, dim=1), (side, side))
    return logits


@pytest.mark.parametrize("backbone", SIZES)
def test_the_three_stages_are_the_cascade_written_out(backbone: BackboneName) -> None:
    network, images = tiny(backbone), sized(backbone)
    with torch.no_grad():
        output = network(images, "dense")
        expected = torch.stack(written_out(network, backbone, images), dim=1)
    torch.testing.assert_close(output.exits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(output.logits, output.exits[:, 2])
    assert expected.std(0).min() > 1e-3, "the images are not told apart"


def test_the_random_directions_of_the_front_are_orthogonal_and_not_trained() -> None:
    layer = Performer(10)
    torch.testing.assert_close(layer.directions @ layer.directions.T, 32 * torch.eye(32), rtol=0, atol=1e-4)
    assert not layer.directions.requires_grad
    assert not torch.equal(layer.directions, Performer(10).directions)


def test_what_is_fixed_or_calibrated_belongs_to_the_checkpoint() -> None:
    buffers = {name for name, _ in tiny("t2t-12").named_buffers()}
    state = tiny("t2t-12").state_dict()
    fixed = {f"stages.{stage}.embed.{layer}.directions" for stage in range(3) for layer in ("first", "second")}
    assert buffers & state.keys() == {"doubt", "normalize.mean", "normalize.std", *fixed}
    assert "threshold" in buffers - state.keys()


@pytest.mark.parametrize(("dim", "count"), [(6, 4), (5, 3)])
def test_positions_are_sines_and_cosines_of_falling_frequency(dim: int, count: int) -> None:
    expected = [
        [(math.sin, math.cos)[channel % 2](position / 10000 ** (2 * (channel // 2) / dim)) for channel in range(dim)] for position in range(count)
    ]
    torch.testing.assert_close(sinusoids(count, dim)[0], torch.tensor(expected))


# ---- gates and executions ----


def patterns(batch: int) -> list[dict[str, Tensor]]:
    """Every combination of two gates for every image, images of a batch disagreeing."""
    combinations = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2)))
    rows = itertools.product(range(4), repeat=min(batch, 2))
    chosen = [torch.stack([combinations[row[image % len(row)]] for image in range(batch)]) for row in rows]
    return [{"exit1": pattern[:, :1], "exit2": pattern[:, 1:]} for pattern in chosen]


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_image_stops_at_the_first_closed_gate_and_gets_that_exits_logits(images: Tensor, batch: int) -> None:
    network, images = tiny(), images[:batch]
    with torch.no_grad():
        exits = network(images, "dense").exits
        for pattern in patterns(batch):
            with forced(network, pattern):
                masked, skipped = network(images, "masked"), network(images, "skipped")
            first, second = pattern["exit1"].flatten(), pattern["exit2"].flatten()
            stop = (first + first * second).long()
            expected = exits[torch.arange(batch), stop]
            torch.testing.assert_close(masked.logits, expected)
            torch.testing.assert_close(skipped.logits, expected)
            torch.testing.assert_close(masked.exits, exits)
            ran = torch.arange(3)[None] <= stop[:, None]
            torch.testing.assert_close(skipped.exits, exits * ran[..., None])
            for output in (masked, skipped):
                assert torch.equal(output.gates["exit1"].executed.flatten(), first)
                assert torch.equal(output.gates["exit2"].executed.flatten(), first * second)
            torch.testing.assert_close(skipped.gates["exit1"].score, masked.gates["exit1"].score)
            known = torch.where(first > 0, masked.gates["exit2"].score.flatten(), masked.gates["exit1"].score.flatten())
            torch.testing.assert_close(skipped.gates["exit2"].score.flatten(), known)


def test_a_stage_is_called_on_its_images_only(images: Tensor) -> None:
    network, rows = tiny(depth=1), {}
    for index, stage in enumerate(network.stages):
        stage.register_forward_hook(lambda module, inputs, output, index=index: rows.__setitem__(index, len(inputs[0])))
    for pattern in patterns(3):
        rows.clear()
        with torch.no_grad(), forced(network, pattern):
            network(images[:3], "skipped")
        second = int(pattern["exit1"].sum())
        third = int((pattern["exit1"] * pattern["exit2"]).sum())
        assert rows == {0: 3, **({1: second} if second else {}), **({2: third} if third else {})}


def test_own_decisions_are_the_same_in_masked_and_skipped_execution(network: DVT, images: Tensor) -> None:
    with torch.no_grad():
        masked, skipped = network(images, "masked"), network(images, "skipped")
    torch.testing.assert_close(masked.logits, skipped.logits)
    assert torch.equal(gate_table(masked.gates).executed, gate_table(skipped.gates).executed)
    levels = gate_table(masked.gates).executed.sum(1)
    assert sorted(levels.unique().tolist()) == [0, 1, 2]
    assert not bool((skipped.gates["exit2"].open & ~skipped.gates["exit1"].open).any()), "an image that stopped asks for more"


@pytest.mark.parametrize("execution", ["masked", "skipped", "dense"])
def test_a_batch_is_its_images_one_by_one(network: DVT, images: Tensor, execution: Execution) -> None:
    with torch.no_grad():
        together, single = network(images, execution), [network(image[None], execution) for image in images]
    torch.testing.assert_close(together.logits, torch.cat([output.logits for output in single]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(together.exits, torch.cat([output.exits for output in single]), rtol=1e-4, atol=1e-4)
    for found, expected in zip(gate_table(together.gates), zip(*(gate_table(output.gates) for output in single), strict=True), strict=True):
        torch.testing.assert_close(found, torch.cat(expected))


def test_the_output_has_one_shape_in_every_execution(network: DVT, images: Tensor) -> None:
    for execution in ("masked", "skipped", "dense"):
        output = network(images, execution)
        check_finite(output)
        assert output.logits.shape == (7, 10)
        assert output.exits.shape == (7, 3, 10)
        assert list(output.gates) == ["exit1", "exit2"]
        for gate in output.gates.values():
            assert gate.score.shape == gate.executed.shape == (7, 1)
            assert bool(((gate.score >= 0) & (gate.score <= 1)).all())
            assert gate.threshold.item() == 0.5
            assert not gate.executed.requires_grad
    assert torch.equal(gate_table(output.gates).executed, torch.ones(7, 2))


def test_the_score_is_the_doubt_against_the_exits_own_threshold(images: Tensor) -> None:
    network = tiny(confidence=[0.3, 0.8])
    torch.testing.assert_close(network.confidence, torch.tensor([0.3, 0.8], dtype=torch.float64), rtol=0, atol=1e-7)
    with torch.no_grad():
        output = network(images)
    for index, threshold in enumerate((0.3, 0.8)):
        confidence = output.exits[:, index].softmax(1).amax(1)
        gate = output.gates[f"exit{index + 1}"]
        torch.testing.assert_close(gate.score.flatten(), (1 - confidence) / (1 - confidence + 1 - threshold), rtol=1e-4, atol=1e-6)
        assert torch.equal(gate.open.flatten(), confidence <= threshold)


def test_a_threshold_that_float32_would_round_to_one_still_decides(images: Tensor) -> None:
    network = tiny()
    with torch.no_grad():
        network.stages[0].head.weight.zero_()
        network.stages[0].head.bias.copy_(torch.tensor([20.0, *[0.0] * 9]))  # a doubt of 9 exp(-20) = 1.855e-8
        for limit, goes_on in ((1.8e-8, 1), (1.9e-8, 0)):
            network.doubt[0] = limit
            assert network(images[:1]).gates["exit1"].executed.item() == goes_on
            check_finite(network(images[:1]))


def test_an_image_as_confident_as_the_threshold_goes_on(images: Tensor) -> None:
    network = tiny(confidence=[0.5, 0.5])
    with torch.no_grad():
        network.stages[0].head.weight.zero_()
        network.stages[0].head.bias.copy_(torch.tensor([50.0] * 2 + [-50.0] * 8))  # two classes at one half each
        gate = network(images[:1]).gates["exit1"]
    assert gate.score.item() == 0.5
    assert gate.executed.item() == 1


# ---- what it learns from ----


@pytest.mark.parametrize("backbone", SIZES)
def test_every_score_has_a_gradient_at_the_input_of_its_own_image_alone(backbone: BackboneName) -> None:
    network, images = tiny(backbone), sized(backbone).requires_grad_()
    for gate in network(images).gates.values():
        (gradient,) = torch.autograd.grad(gate.score[1].sum(), images, retain_graph=True)
        assert bool(torch.isfinite(gradient).all())
        assert gradient[1].abs().max() > 0
        assert gradient[[0, 2]].abs().max() == 0


def test_the_scores_gradient_is_the_slope_of_the_score() -> None:
    network = tiny("t2t-12", depth=1).double()
    images = sized("t2t-12", 2).double()
    direction = torch.randn_like(images)
    for name in ("exit1", "exit2"):
        images.requires_grad_()
        (gradient,) = torch.autograd.grad(network(images).gates[name].score.sum(), images)
        images = images.detach()
        step = 1e-5
        ends = [network(images + sign * step * direction).gates[name].score.sum() for sign in (1, -1)]
        torch.testing.assert_close((gradient * direction).sum(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-9)


def test_stage_three_hears_of_stage_one_through_both_kinds_of_reuse(images: Tensor) -> None:
    images = images[:2]
    for feature_reuse, relation_reuse in ((True, False), (False, True), (False, False)):
        network = tiny(feature_reuse=feature_reuse, relation_reuse=relation_reuse)
        logits = network(images, "dense").logits
        gradient = torch.autograd.grad(logits.square().sum(), network.stages[0].class_token, allow_unused=True)[0]
        assert (gradient is not None and bool(gradient.any())) == (feature_reuse or relation_reuse)


@pytest.mark.parametrize("backbone", SIZES)
def test_every_parameter_but_idle_ones_has_a_gradient_and_training_lowers_the_loss(backbone: BackboneName) -> None:
    torch.manual_seed(5)
    network, images, labels = DVT(backbone, 10, **TINY), sized(backbone, 8), torch.arange(8)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    losses = []
    # The last classifier reads the class token alone, which gets no context: the original computes one for its last MLP all the same.
    idle = [name for name, _ in network.named_parameters() if name.startswith(f"stages.2.blocks.{TINY['depth'] - 1}.reuse.")]
    for _ in range(20):
        exits = network.train()(images).exits
        loss = torch.stack([functional.cross_entropy(logits, labels) for logits in exits.unbind(1)]).sum()
        optimizer.zero_grad()
        loss.backward()
        unheard = [name for name, parameter in network.named_parameters() if parameter.grad is None or not parameter.grad.any()]
        assert unheard == idle or losses
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(3 * math.log(10), rel=0.1)
    assert losses[-1] < 0.75 * losses[0]


def test_blocks_are_dropped_in_training_only_and_more_of_the_late_ones(images: Tensor) -> None:
    network = tiny(depth=3, drop_path=0.5)
    assert [block.drop_path.p for block in network.stages[1].blocks] == [0, 0.25, 0.5]
    with torch.no_grad():
        assert torch.equal(network(images).exits, network(images).exits)
        network.train()
        assert not torch.equal(network(images).exits, network(images).exits)
        still = tiny(drop_path=0.0)
        assert torch.equal(still.train()(images).exits, still.eval()(images).exits)
        block = network.stages[1].blocks[2]
        branch = torch.ones(2000, 4, 5)
        kept = block.drop_path(branch)
    assert kept.unique().tolist() == [0, 2]
    assert bool((kept.flatten(1).amin(1) == kept.flatten(1).amax(1)).all()), "an image is dropped whole or not at all"
    assert kept.mean().item() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("backbone", SIZES)
def test_scores_are_float32_under_autocast(backbone: BackboneName) -> None:
    network, images = tiny(backbone), sized(backbone)
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough, skipped = network(images), network(images, "skipped")
    for output in (rough, skipped):
        check_finite(output)
        assert output.exits.dtype == torch.bfloat16
        assert all(gate.score.dtype == torch.float32 for gate in output.gates.values())
    torch.testing.assert_close(rough.exits.float(), exact.exits, rtol=0.2, atol=0.2 * exact.exits.std().item())


def test_channels_last_changes_nothing(images: Tensor) -> None:
    network = tiny()
    with torch.no_grad():
        plain = network(images)
        output = network.to(memory_format=torch.channels_last)(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output.exits, plain.exits, rtol=1e-4, atol=1e-4)


# ---- how it is built ----


def test_the_arguments_rebuild_the_network() -> None:
    network = tiny("deit-s", confidence=[0.4, 0.9], relation_reuse=False, drop_path=0.2)
    twin = DVT(**network.arguments)
    assert twin.arguments == network.arguments
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == {name: tensor.shape for name, tensor in network.state_dict().items()}
    network.doubt[0] = 0.01
    twin.load_state_dict(network.state_dict())
    assert twin.confidence.tolist() == network.confidence.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "t2t-19"}, "backbone must be one of t2t-12, t2t-14, deit-s, small-32, compact-32, got 't2t-19'"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"confidence": [0.5]}, r"confidence must be two softmax probabilities in \(0, 1\), of exits 1 and 2, got \(0.5,\)"),
        ({"confidence": [0.5, 1.0]}, r"got \(0.5, 1.0\)"),
        ({"confidence": [0.0, 0.5]}, r"got \(0.0, 0.5\)"),
        ({"dim": 10, "heads": 4}, "dim a multiple of heads, got 10, 1 and 4"),
        ({"depth": 0}, "at least 1"),
        ({"heads": 0}, "at least 1"),
        ({"drop_path": 1.0}, r"drop_path must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DVT(**{"backbone": "small-32", "dim": 16, "depth": 1, "heads": 2, **arguments})


def test_an_unknown_execution_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match="execution must be one of masked, dense, skipped, got 'sparse'"):
        tiny()(images, "sparse")  # type: ignore[arg-type]
