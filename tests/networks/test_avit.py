"""A-ViT against arithmetic, torch's own transformer layers token by token, and itself in its other executions."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from gatewatt.flops import ExecutionMeter, compare_routes, price, random_patterns
from gatewatt.gating import DynamicOutput, accumulate, advance, check_finite, forced, gate_table, go_on_score, start_halting
from gatewatt.networks.avit import AViT, halting_center, pack
from gatewatt.networks.vit import positions_at

DEPTH, TOKENS = 4, 17


def tiny(depth: int = DEPTH, seed: int = 2) -> AViT:
    """Four layers on 4x4 patches of 16x16 pixels, random enough that tokens halt after every layer and images differ."""
    torch.manual_seed(seed)
    network = AViT("small-32", 10, image_size=16, patch=4, dim=12, depth=depth, heads=3, gate_scale=2.0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1 or "bias" in name:
                parameter.normal_(0, 0.35 if "blocks" in name or "head" in name else 0.5)
        network.gate_center.fill_(halting_center(network.signal(pictures(torch.linspace(0, 1, 9))), 2.0, 0.45))
    return network.eval()


def pictures(contrast: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(len(contrast), 3, 16, 16, generator=generator)
    return (0.5 + contrast.view(-1, 1, 1, 1) * (noise - 0.5)).clamp(0, 1)


@pytest.fixture(scope="module")
def shared() -> AViT:
    return tiny()


@pytest.fixture
def network(shared: AViT) -> AViT:
    shared.load_state_dict(tiny().state_dict())
    return shared.eval().float()


@pytest.fixture
def images() -> Tensor:
    return pictures(torch.tensor([0.0, 0.3, 1.0, 0.8, 0.1]))


def reference_layers(network: AViT) -> list[nn.TransformerEncoderLayer]:
    """The same layers built by torch."""
    dim, heads = network.pos_embed.shape[2], network.blocks[0].attn.product.heads
    layers = []
    for block in network.blocks:
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", norm_first=True, batch_first=True, layer_norm_eps=1e-6)
        mapped = {"in_proj_": "attn.qkv.", "out_proj.": "attn.proj.", "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1."}
        mapped |= {"norm2.": "norm2."}
        state = block.state_dict()
        names = {
            name: next(name.replace(f"self_attn.{old}", new).replace(old, new) for old, new in mapped.items() if old in name)
            for name in layer.state_dict()
        }
        layer.load_state_dict({name: state[own] for name, own in names.items()})
        # Training mode without dropout computes the same by the open path, whatever fused kernels there are.
        layers.append(layer.to(network.pos_embed.dtype).train())
    return layers


def token_by_token(network: AViT, image: Tensor) -> tuple[Tensor, float, list[list[int]]]:
    """Logits, ponder and the live tokens of layers 2 .. L by the definition: lists of tokens, from which the halted ones are struck."""
    hidden = list(network.embed(image[None])[0])
    live = list(range(len(hidden)))
    total, ponder = [0.0] * len(hidden), [0.0] * len(hidden)
    predicted, history = torch.zeros_like(hidden[0]), []
    for index, layer in enumerate(reference_layers(network)):
        if live:
            after = layer(torch.stack([hidden[token] for token in live])[None])[0]
            for token, state in zip(live, after, strict=True):
                hidden[token] = state
        for token in list(live):
            score = torch.sigmoid(2.0 * hidden[token][0] - network.gate_center).item()
            ponder[token] += 1
            if index == len(network.blocks) - 1 or total[token] + score >= 0.99:
                weight = 1 - total[token]
                ponder[token] += weight
                live.remove(token)
            else:
                weight = score
            total[token] += score
            if token == 0:
                predicted = predicted + weight * hidden[0]
        history.append(list(live))
    return network.head(network.norm(predicted)), sum(ponder) / len(ponder), history[:-1]


# ---- what it costs ----


def test_the_compact_variant_stands_behind_two_convolutions() -> None:
    """By hand: 3x3 from 3 to 64 and 64 to 64 channels at 16x16, 2x2 patches of these, then 6 layers of dim 96 on 65 tokens."""
    ledger = price(AViT("compact-32", 10), torch.zeros(1, 3, 32, 32))
    layer = 65 * 12 * 96**2 + 2 * 65**2 * 96
    assert ledger.dense == 9 * (3 + 64) * 64 * 16**2 + 64 * 4 * 64 * 96 + 6 * layer + 96 * 10
    assert ledger.fixed == ledger.dense - 5 * layer


def test_tokens_behind_convolutions_are_skipped_exactly() -> None:
    torch.manual_seed(4)
    network = AViT("small-32", 10, image_size=16, dim=12, depth=4, heads=3, stem=8, gate_scale=2.0).eval()
    images = pictures(torch.tensor([0.0, 0.3, 1.0]))
    network.gate_center.fill_(halting_center(network.signal(images), 2.0, 0.45))
    ledger = price(network, images[:1])
    for pattern in random_patterns(network, images, 8):
        assert compare_routes(network, images, ledger, pattern).agree
    torch.testing.assert_close(network(images).logits, network(images, "skipped").logits)


@pytest.mark.parametrize(
    ("size", "dim", "total", "block", "stem"), [("tiny", 192, "1.2537", "102.05", "28.9"), ("small", 384, "4.5989", "378.39", "57.8")]
)
def test_prices_are_the_papers_to_the_last_mac(size: str, dim: int, total: str, block: str, stem: str) -> None:
    network = AViT(size, 1000)  # type: ignore[arg-type]
    ledger = price(network, torch.zeros(1, 3, 224, 224))
    n = 197
    layer, embedding = 12 * n * dim**2 + 2 * n**2 * dim, 196 * 3 * 16 * 16 * dim
    assert ledger.dense == embedding + 12 * layer + dim * 1000
    assert ledger.fixed == embedding + layer + dim * 1000
    assert ledger.overhead == 0
    assert (f"{ledger.dense / 1e9:.4f}", f"{layer / 1e6:.2f}", f"{embedding / 1e6:.1f}") == (total, block, stem)
    assert ledger.prices["blocks.5.attn.product"] == 2 * n**2 * dim
    assert ledger.units == {f"layer{index}": n for index in range(2, 13)}
    with torch.no_grad():
        gates = network(torch.zeros(1, 3, 32, 32), "dense").gates
    assert list(gates) == list(ledger.units)


def test_every_token_of_every_layer_weighs_the_same(network: AViT, images: Tensor) -> None:
    ledger = price(network, images[:1])
    weights = ledger.weights(network(images).gates)
    torch.testing.assert_close(weights, torch.full((3 * TOKENS,), 1 / (3 * TOKENS), dtype=torch.float64))


def test_a_layer_costs_a_linear_and_a_square_part(network: AViT, images: Tensor) -> None:
    output = network(images, "skipped")
    counts = torch.stack([gate.executed.sum(1) for gate in output.gates.values()], 1).double()
    always = 16 * 48 * 12 + 12 * 10 + 12 * TOKENS * 144 + 2 * TOKENS**2 * 12
    assert price(network, images[:1])(output.gates).tolist() == (always + (12 * counts * 144 + 2 * counts**2 * 12).sum(1)).tolist()


@pytest.mark.parametrize(("batch", "count"), [(1, 40), (2, 40), (3, 40)])
def test_four_routes_agree_on_random_patterns(batch: int, count: int, images: Tensor) -> None:
    network = tiny(3)
    ledger = price(network, images[:1])
    for pattern in [None, *random_patterns(network, images[:batch], count, seed=batch)]:
        routes = compare_routes(network, images[:batch], ledger, pattern)
        assert routes.agree, (routes, pattern)


def test_four_routes_agree_where_class_tokens_or_whole_images_are_dead(network: AViT, images: Tensor) -> None:
    # What nothing reads any more, a trace might drop; it was computed all the same, and must be counted.
    ledger = price(network, images[:1])
    everything = {f"layer{index}": torch.ones(2, TOKENS) for index in range(2, DEPTH + 1)}
    headless = {name: torch.cat([torch.zeros(2, 1), ones[:, 1:]], 1) for name, ones in everything.items()}
    one_dead = {name: ones * torch.tensor([[0.0], [1.0]]) for name, ones in everything.items()}
    for pattern in (everything, headless, one_dead, {name: 0 * ones for name, ones in everything.items()}):
        routes = compare_routes(network, images[:2], ledger, pattern)
        assert routes.agree, (routes, pattern)
    assert routes.ledger == 2 * ledger.fixed


def test_hooks_see_whole_images_in_masked_and_dense_execution(network: AViT, images: Tensor) -> None:
    ledger = price(network, images[:1])
    for execution in ("masked", "dense"):
        with ExecutionMeter(network, ledger) as meter:
            network(images, execution)
        assert meter.total == len(images) * ledger.dense


# ---- what it computes ----


def test_dense_execution_is_torchs_vision_transformer(network: AViT, images: Tensor) -> None:
    hidden = network.embed(images)
    for layer in reference_layers(network):
        hidden = layer(hidden)
    output = network(images, "dense")
    torch.testing.assert_close(output.logits, network.head(network.norm(hidden[:, 0])), rtol=1e-4, atol=1e-5)
    assert bool(gate_table(output.gates).executed.all())
    assert output.aux["ponder"].tolist() == [DEPTH + 1] * len(images)


def test_without_halting_the_dynamic_network_is_the_static_one(network: AViT, images: Tensor) -> None:
    network.gate_center.fill_(1000.0)
    dense = network(images, "dense").logits
    for execution in ("masked", "skipped"):
        output = network(images, execution)
        torch.testing.assert_close(output.logits, dense, rtol=1e-4, atol=1e-5)
        assert bool(gate_table(output.gates).executed.all())


def test_tokens_halt_as_defined(network: AViT, images: Tensor) -> None:
    masked, skipped = network(images), network(images, "skipped")
    counts = [gate.executed.sum().item() for gate in masked.gates.values()]
    assert len(images) * TOKENS > counts[0] > counts[1] > counts[2] > 0, "the example must halt tokens everywhere"
    for index, image in enumerate(images):
        logits, ponder, history = token_by_token(network, image)
        for output in (masked, skipped):
            torch.testing.assert_close(output.logits[index], logits, rtol=1e-3, atol=1e-4)
            assert output.aux["ponder"][index].item() == pytest.approx(ponder, rel=1e-5)
            assert [gate.executed[index].nonzero().flatten().tolist() for gate in output.gates.values()] == history


def test_masked_and_skipped_report_the_same(network: AViT, images: Tensor) -> None:
    masked, skipped = network(images), network(images, "skipped")
    for output in (masked, skipped):
        check_finite(output)
    for name, gate in masked.gates.items():
        torch.testing.assert_close(gate.score, skipped.gates[name].score)
        assert torch.equal(gate.executed, skipped.gates[name].executed)
        # Sums of scores never fall, so what a unit asks for is what runs.
        assert torch.equal(gate.executed, gate.open.float())
        assert not gate.executed.requires_grad
    for name, value in masked.aux.items():
        torch.testing.assert_close(value, skipped.aux[name])


def test_images_never_interact(network: AViT, images: Tensor) -> None:
    for execution in ("masked", "skipped", "dense"):
        together = network(images, execution)
        for index in range(len(images)):
            alone = network(images[index : index + 1], execution)
            torch.testing.assert_close(alone.logits[0], together.logits[index], rtol=1e-4, atol=1e-5)
            for name, value in together.aux.items():
                torch.testing.assert_close(alone.aux[name][0], value[index])
            for name, gate in together.gates.items():
                assert torch.equal(alone.gates[name].executed[0], gate.executed[index])


def test_a_halted_tokens_score_stays_where_it_halted(network: AViT, images: Tensor) -> None:
    gates = list(network(images).gates.values())
    for before, after in pairwise(gates):
        halted = before.executed == 0
        assert torch.equal(after.score[halted], before.score[halted])
        assert bool((after.score[~halted] != before.score[~halted]).any())


def test_a_forced_pattern_is_obeyed_as_far_as_nesting_allows(network: AViT, images: Tensor) -> None:
    for pattern in random_patterns(network, images, 5):
        with forced(network, pattern):
            output = network(images)
        chain = torch.ones(len(images), TOKENS)
        for name, gate in output.gates.items():
            chain = chain * pattern[name]
            assert torch.equal(gate.executed, chain)


def test_weights_of_a_tokens_states_add_up_to_one(network: AViT, images: Tensor) -> None:
    # If every layer leaves the class token as it is, its average is the token itself, whatever the scores and wherever it halts.
    for block in network.blocks:
        for layer in (block.attn.proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    expected = network.head(network.norm(network.embed(images)[:, 0]))
    for pattern in random_patterns(network, images, 5):
        with forced(network, pattern):
            torch.testing.assert_close(network(images).logits, expected, rtol=1e-4, atol=1e-5)


def test_ponder_is_layers_run_and_remainder(network: AViT, images: Tensor) -> None:
    ponder = network(images).aux["ponder"]
    assert ponder.shape == (len(images),)
    assert bool(((ponder >= 2) & (ponder <= DEPTH + 1)).all())
    assert ponder.unique().numel() > 1


def halting_of(output: DynamicOutput) -> list[Tensor]:
    """h of every token after each layer but the last, (B, N), of those that run: G = d / (d + eps + c) read backwards, d = 1 - h, eps = 0.01."""
    scores = [gate.score for gate in output.gates.values()]
    found: list[Tensor] = []
    total = torch.zeros_like(scores[0])
    for score in scores:
        found.append(1 - score * (0.01 + total) / (1 - score))
        total = total + found[-1]
    return found


def test_mean_halting_scores_are_over_live_patch_tokens(network: AViT, images: Tensor) -> None:
    # In float64: what is read backwards gains rounding errors layer by layer.
    output = copy.deepcopy(network).double()(images.double())
    running = [torch.ones(len(images), TOKENS, dtype=torch.float64), *(gate.executed for gate in output.gates.values())]
    assert torch.equal(output.aux["live"], torch.stack([mask[:, 1:].sum(1) for mask in running], 1))
    for layer, halting in enumerate(halting_of(output)):
        for image in range(len(images)):
            live = running[layer][image, 1:] > 0
            expected = halting[image, 1:][live].mean() if live.any() else torch.tensor(0.0, dtype=torch.float64)
            torch.testing.assert_close(output.aux["halting"][image, layer], expected, rtol=1e-4, atol=1e-5)
    last = output.aux["halting"][:, -1]
    assert bool(((last >= 0) & (last < 1)).all())


def test_a_dead_class_token_hears_nothing_more(network: AViT, images: Tensor) -> None:
    alive = {f"layer{index}": torch.ones(len(images), TOKENS) for index in range(2, DEPTH + 1)}
    for ones in list(alive.values())[1:]:
        ones[:, 0] = 0
    silent = {name: ones * (torch.arange(TOKENS) % 2 if name == "layer4" else 1) for name, ones in alive.items()}
    logits = []
    for pattern in (alive, silent):
        with forced(network, pattern):
            logits.append(network(images).logits)
    assert torch.equal(logits[0], logits[1])


# ---- what it learns from ----


def test_every_gate_reaches_the_pixels_of_its_own_image_alone(network: AViT, images: Tensor) -> None:
    images.requires_grad_()
    for gate in network(images).gates.values():
        for unit in (0, 1, TOKENS - 1):
            (gradient,) = torch.autograd.grad(gate.score[2, unit], images, retain_graph=True)
            assert bool(torch.isfinite(gradient).all())
            assert gradient[2].abs().max() > 0
            assert gradient[[0, 1, 3, 4]].abs().max() == 0


def test_dead_tokens_pass_no_gradient(network: AViT, images: Tensor) -> None:
    halted = {f"layer{index}": torch.zeros(len(images), TOKENS) for index in range(2, DEPTH + 1)}
    with forced(network, halted):
        network(images).logits.square().sum().backward()
    for block in list(network.blocks)[1:]:
        assert all(parameter.grad is None or not bool(parameter.grad.any()) for parameter in block.parameters())
    assert bool(network.blocks[0].mlp.fc1.weight.grad.any())
    network.zero_grad(set_to_none=True)


def test_the_gradient_of_ponder_and_logits_is_that_of_the_function(network: AViT, images: Tensor) -> None:
    network.double()
    images = images[2:3].double().requires_grad_()

    def measured(pixels: Tensor) -> Tensor:
        output = network(pixels)
        return output.aux["ponder"].sum() + output.logits.square().sum() + gate_table(output.gates).score.sum()

    (gradient,) = torch.autograd.grad(measured(images), images)
    # The function jumps where a token halts; a small step along a direction does not cross such a place here.
    direction, step = torch.randn_like(images), 1e-6
    with torch.no_grad():
        slope = (measured(images + step * direction) - measured(images - step * direction)) / (2 * step)
    assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4)


def test_a_training_step_lowers_the_loss(network: AViT, images: Tensor) -> None:
    network.train()
    labels = torch.arange(len(images))
    optimizer, losses = torch.optim.AdamW(network.parameters(), 1e-3), []
    for _ in range(8):
        loss = nn.functional.cross_entropy(network(images).logits, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_scores_are_float32_under_autocast(network: AViT, images: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for execution in ("masked", "skipped", "dense"):
            output = network(images, execution)
            assert {gate.score.dtype for gate in output.gates.values()} == {torch.float32}
            assert output.aux["ponder"].dtype == torch.float32
            check_finite(output)


# ---- its center ----


def test_the_center_makes_the_mean_of_the_scores(network: AViT, images: Tensor) -> None:
    network.gate_center.fill_(1000.0)
    signal = network.signal(images)
    assert signal.shape == (len(images), DEPTH - 1, TOKENS)
    for mean in (0.01, 0.05, 0.5):
        network.gate_center.fill_(halting_center(signal, network.gate_scale, mean))
        # By the network's own scores: nothing halts in this pattern, so the sums run on.
        open_all = {f"layer{index}": torch.ones(len(images), TOKENS) for index in range(2, DEPTH + 1)}
        exact = copy.deepcopy(network).double()
        with forced(exact, open_all):
            halting = torch.stack(halting_of(exact(images.double())))
        assert halting.mean().item() == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    ("signal", "mean", "message"),
    [
        (torch.rand(3), 0.0, r"mean must be in \(0, 1\), got 0.0"),
        (torch.rand(3), 1.0, "got 1.0"),
        (torch.rand(0), 0.03, "finite and not empty"),
        (torch.tensor([1.0, float("nan")]), 0.03, "finite and not empty"),
    ],
)
def test_a_center_that_cannot_be_found_is_refused(signal: Tensor, mean: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        halting_center(signal, 10.0, mean)


def test_the_center_travels_with_the_weights(network: AViT) -> None:
    twin = AViT(**network.arguments)
    twin.load_state_dict(network.state_dict())
    assert twin.gate_center.item() == network.gate_center.item() != 30.0


# ---- how it is built ----


def test_parameters_are_named_as_in_deits_checkpoints() -> None:
    per_block = [f"{layer}.{kind}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")]
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias", "head.weight", "head.bias"}
    names |= {f"blocks.{index}.{name}" for index in range(DEPTH) for name in per_block}
    assert set(tiny().state_dict()) == names | {"normalize.mean", "normalize.std", "gate_center"}


def test_tokens_are_packed_by_how_many_an_image_has() -> None:
    alive = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 1]])
    packing = pack(alive)
    assert packing is not None
    assert packing.rows.tolist() == [0, 2, 6, 7, 8, 10, 11]
    assert [group.tolist() for group in packing.groups] == [[[0, 1], [5, 6]], [[2, 3, 4]]]
    order = torch.cat([group.flatten() for group in packing.groups])
    assert order[packing.back].tolist() == list(range(7))
    assert pack(torch.zeros(2, 3)) is None


def test_other_resolutions_interpolate_the_positions(network: AViT) -> None:
    for height, width in [(8, 8), (16, 32), (32, 32)]:
        images = torch.rand(2, 3, height, width)
        tokens = 1 + height * width // 16
        masked, skipped = network(images), network(images, "skipped")
        assert masked.gates["layer2"].score.shape == (2, tokens)
        torch.testing.assert_close(masked.logits, skipped.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(positions_at((4, 4), network.pos_embed, (4, 4)), network.pos_embed)
    network.pos_embed.data[:, 1:] = 0.25
    torch.testing.assert_close(positions_at((3, 7), network.pos_embed, (4, 4))[:, 1:], torch.full((1, 21, 12), 0.25))


def test_images_that_patches_do_not_tile_are_refused(network: AViT) -> None:
    with pytest.raises(ValueError, match=r"multiples of the patch size 4, got \(16, 18\)"):
        network(torch.rand(1, 3, 16, 18))


def test_an_unknown_execution_is_refused(network: AViT, images: Tensor) -> None:
    with pytest.raises(ValueError, match="execution must be one of masked, dense, skipped, got 'sparse'"):
        network(images, "sparse")  # type: ignore[arg-type]


def test_the_arguments_rebuild_the_network(network: AViT) -> None:
    twin = AViT(**network.arguments)
    assert twin.arguments == network.arguments
    assert {name: tensor.shape for name, tensor in twin.state_dict().items()} == {name: tensor.shape for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "base"}, "size must be one of tiny, small, small-32, compact-32, got 'base'"),
        ({"depth": 1}, "depth at least 2"),
        ({"patch": 5}, "patch must divide image_size, got 5 and 32"),
        ({"stem": 8, "patch": 1}, "patch even behind one that is not 0, got 8 and 1"),
        ({"stem": -1}, "stem must be at least 0"),
        ({"heads": 5}, "heads must divide dim, got 5 and 192"),
        ({"dim": 0}, "must be at least 1"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"gate_scale": 0.0}, "gate_scale must be positive"),
        ({"eps": 1.0}, r"eps in \(0, 1\)"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
    ],
)
def test_a_network_that_does_not_exist_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AViT(**arguments)  # type: ignore[arg-type]


# ---- the algebra it rests on ----


def test_ponder_falls_by_one_per_unit_of_halting_before_the_last_layer() -> None:
    scores = torch.tensor([0.3, 0.5, 0.4, 0.9], requires_grad=True)
    state = start_halting(torch.zeros(1, 1))
    weights, last = [], torch.ones(1, 1)
    for index, score in enumerate(scores):
        cumulative, last = accumulate(state, score.view(1, 1)), go_on_score(state, torch.logit(score).view(1, 1), last)
        go_on = (last >= 0.5).float() if index < 3 else torch.zeros(1, 1)
        weight, state = advance(state, score.view(1, 1), cumulative, go_on)
        weights.append(weight.item())
    # Stops after the third: 0.3 + 0.5 + 0.4 >= 0.99.
    assert weights == pytest.approx([0.3, 0.5, 0.2, 0.0])
    assert state.ponder.item() == pytest.approx(3.2)
    state.ponder.sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [-1.0, -1.0, 0.0, 0.0]
