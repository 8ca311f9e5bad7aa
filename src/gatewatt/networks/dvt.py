"""DVT: three separate vision transformers with more and more tokens; an image moves on to the next one if the exit is not confident.

Wang et al., "Not All Images are Worth 16x16 Words: Dynamic Transformers for Efficient Image Recognition" (NeurIPS 2021), over T2T-ViT (Yuan et
al., ICCV 2021) or DeiT (Touvron et al., ICML 2021). A later stage reuses what an earlier one computed: its tokens join the input of every MLP
(feature reuse), its attention logits are added to those of every layer (relation reuse).

Always computed: stage 1. Stages 2 and 3, each with its reuse modules and its classifier, run where the gates ``exit1`` and ``exit2`` are
open. Gate k's score is the doubt that exit k leaves; an image that stopped stays stopped.

Mended: in evaluation the original computes all three stages and simulates the exits; here later stages do not run. It transforms the class
token for feature reuse and throws the result away; here it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from gatewatt.gating import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, check_execution, exit_score, hard
from gatewatt.networks.layers import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, Normalize
from gatewatt.networks.t2t import T2T_WINDOW, SinusoidalPositions, TokensToToken, Window, cut
from gatewatt.networks.vit import Grid, attend, drop_paths, early_convolutions, initialize_linear, positions_at, sequence

BackboneName = Literal["t2t-12", "t2t-14", "deit-s", "small-32", "compact-32"]
CONTEXT_HIDDEN, CONTEXT = 128, 48  # feature reuse: channels of its hidden layer, and channels that each MLP gets
RELATION_EXPANSION = 3  # relation reuse: hidden maps per attention map


@dataclass(frozen=True)
class Layout:
    """One kind of vision transformer and how its three stages cut the image.

    Attributes:
        dim: channels of a token.
        depth: blocks of each stage.
        heads: attention heads of each block.
        mlp_ratio: hidden units of an MLP per channel.
        windows: of the three stages; the whole patch embedding, or the first of the three splits of a T2T front.
        multiples: how much finer the patches of stages 1 and 2 are repeated before they are averaged into those of the stage that follows.
        size: side of the images that the positions are made for; others work too.
        t2t: a T2T front, sinusoidal positions and no bias in the attention; otherwise one convolution, learned positions and a bias.
        stem: channels of two 3x3 convolutions in front of that one, which then cuts half as wide; 0 for none.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: int
    windows: tuple[Window, Window, Window]
    multiples: tuple[int, int]
    size: int
    t2t: bool
    stem: int = 0

    @property
    def eps(self) -> float:
        """Of every LayerNorm in the blocks."""
        return 1e-5 if self.t2t else 1e-6

    def grid(self, stage: int, height: int, width: int) -> Grid:
        """Rows and columns of patches of ``stage`` (0, 1, 2) for an image of this size."""
        rows, columns = (cut(side, self.windows[stage]) for side in (height, width))
        return (cut(cut(rows, T2T_WINDOW), T2T_WINDOW), cut(cut(columns, T2T_WINDOW), T2T_WINDOW)) if self.t2t else (rows, columns)


T2T_WINDOWS: tuple[Window, Window, Window] = ((14, 8, 3), (11, 6, 5), (7, 4, 2))

LAYOUTS: dict[str, Layout] = {
    "t2t-12": Layout(256, 12, 4, 2, T2T_WINDOWS, (2, 2), 224, t2t=True),
    "t2t-14": Layout(384, 14, 6, 3, T2T_WINDOWS, (2, 2), 224, t2t=True),
    "deit-s": Layout(384, 12, 6, 4, ((32, 32, 0), (23, 23, 3), (16, 16, 0)), (2, 2), 224, t2t=False),
    # No original: for 32x32 images, 4x4, 6x6 and 8x8 patches; repeated to 12x12 and 24x24, their common multiples.
    "small-32": Layout(192, 6, 3, 2, ((8, 8, 0), (6, 6, 2), (4, 4, 0)), (3, 4), 32, t2t=False),
    # The same for the CPU: half the width, less depth, and two convolutions in front of every stage.
    "compact-32": Layout(96, 4, 2, 2, ((8, 8, 0), (6, 6, 2), (4, 4, 0)), (3, 4), 32, t2t=False, stem=48),
}


# ---- from pixels to tokens ----


class LearnedPositions(nn.Module):
    """One learned vector per token; for a grid of another size those of the patches are interpolated bilinearly.

    Args:
        grid: of the patches that there is a vector for.
        dim: channels of a token.
    """

    def __init__(self, grid: Grid, dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + grid[0] * grid[1], dim), std=0.02))

    def forward(self, grid: Grid) -> Tensor:
        """(1, 1 + rows x columns, dim)."""
        return positions_at(grid, self.table, self.grid)


def patch_embedding(layout: Layout, window: Window) -> nn.Module:
    """From standardised pixels (B, 3, H, W) to patches (B, dim, rows, columns)."""
    if layout.t2t:
        return TokensToToken(layout.dim, window)
    if not layout.stem:
        return nn.Conv2d(3, layout.dim, *window)
    kernel, stride, padding = (each // 2 for each in window)
    return nn.Sequential(early_convolutions(layout.stem), nn.Conv2d(layout.stem, layout.dim, kernel, stride, padding))


# ---- from one stage to the next ----


class Handover(NamedTuple):
    """What a stage leaves to the next one.

    Attributes:
        tokens: after the last block, before the final norm, (B, 1 + rows x columns, D).
        relations: attention logits of all layers and heads, (B, depth x heads, T, T); None if nobody reads them.
        grid: rows and columns of the patches.
    """

    tokens: Tensor
    relations: Tensor | None
    grid: Grid

    def at(self, rows: Tensor) -> Handover:
        """The same for some images of the batch."""
        return Handover(self.tokens[rows], None if self.relations is None else self.relations[rows], self.grid)


class Resampling(nn.Module):
    """Brings an axis of patches to a finer grid: nearest upsampling by a whole factor, then adaptive averaging, as the original does.

    Along one side every new patch then mixes at most two neighbouring old ones, so rows and columns are each one interpolation with
    constant weights. No repeated maps are kept, and unlike adaptive pooling it has a deterministic gradient on a GPU.

    Args:
        source: side of the old grid that weights are kept for.
        target: side of the new one.
        multiple: factor of the upsampling.
    """

    near: Tensor
    far: Tensor
    share: Tensor

    def __init__(self, source: int, target: int, multiple: int) -> None:
        super().__init__()
        self.sides, self.multiple = (source, target), multiple
        for name, values in zip(("near", "far", "share"), taps(source, target, multiple), strict=True):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, values: Tensor, dim: int, source: Grid, target: Grid) -> Tensor:
        """Resample the axis ``dim``, of rows x columns patches in ``source``, to those in ``target``."""
        values = values.unflatten(dim, source)
        for axis, sides in enumerate(zip(source, target, strict=True), start=dim):
            near, far, share = (self.near, self.far, self.share) if sides == self.sides else self._other(*sides)
            weights = share.to(values.dtype).view(-1, *[1] * (values.ndim - axis - 1))
            values = torch.lerp(values.index_select(axis, near), values.index_select(axis, far), weights)
        return values.flatten(dim, dim + 1)

    def _other(self, source: int, target: int) -> tuple[Tensor, ...]:
        """The weights for sides that none are kept for: images of another size."""
        return tuple(torch.tensor(values, device=self.near.device) for values in taps(source, target, self.multiple))


def taps(source: int, target: int, multiple: int) -> tuple[list[int], list[int], list[float]]:
    """For each of ``target`` new positions: the two old positions that it mixes, and the share of the second one.

    Raises:
        ValueError: if the new grid is coarser than the old one, where two positions would not do.

    Example:
        >>> taps(2, 3, multiple=2)
        ([0, 0, 1], [0, 1, 1], [0.0, 0.5, 0.0])
    """
    if target < source:
        raise ValueError(f"a stage has {target} patches along a side and the one before it {source}; give images of another size")
    near, far, share = [], [], []
    fine = source * multiple
    for position in range(target):
        start, end = position * fine // target, -(-(position + 1) * fine // target)
        first, last = start // multiple, (end - 1) // multiple
        near.append(first)
        far.append(last)
        share.append((end - last * multiple) / (end - start) if last > first else 0.0)
    return near, far, share


class FeatureReuse(nn.Module):
    """What one block's MLP learns from the tokens of the stage before: LayerNorm and an MLP of its own, resampled to the finer grid.

    Args:
        dim: channels of a token.
        eps: of the LayerNorm.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.LayerNorm(dim, eps), nn.Linear(dim, CONTEXT_HIDDEN), nn.GELU(), nn.Linear(CONTEXT_HIDDEN, CONTEXT))

    def forward(self, upstream: Handover, resample: Resampling, grid: Grid) -> Tensor:
        """Context (B, 1 + rows x columns, 48) of the finer ``grid``, zeros for the class token."""
        patches = resample(self.transform(upstream.tokens[:, 1:]), 1, upstream.grid, grid)
        return functional.pad(patches, (0, 0, 1, 0))


class RelationReuse(nn.Module):
    """What all layers learn from all attention logits of the stage before: two 1x1 convolutions over the stack of maps, resampled.

    Args:
        depth: layers.
        heads: attention heads of each.
    """

    def __init__(self, depth: int, heads: int) -> None:
        super().__init__()
        self.depth = depth
        maps = depth * heads
        self.mix = nn.Sequential(nn.Conv2d(maps, RELATION_EXPANSION * maps, 1), nn.GELU(), nn.Conv2d(RELATION_EXPANSION * maps, maps, 1))

    def forward(self, relations: Tensor, resample: Resampling, source: Grid, target: Grid) -> tuple[Tensor, ...]:
        """One summand (B, heads, T, T) for the attention logits of each layer; the class token's row and column are carried along."""
        maps = self.mix(relations)
        for dim in (3, 2):
            first, patches = maps.split([1, source[0] * source[1]], dim=dim)
            maps = torch.cat([first, resample(patches, dim, source, target)], dim=dim)
        return maps.chunk(self.depth, dim=1)


# ---- one stage ----


class Attention(nn.Module):
    """Multi-head self-attention that shows its logits.

    Args:
        dim: channels of a token.
        heads: attention heads.
        bias: of queries, keys and values.
    """

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.projection = nn.Linear(dim, 3 * dim, bias=bias), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, relation: Tensor | None) -> tuple[Tensor, Tensor]:
        """Attended tokens (B, T, D) and the logits (B, heads, T, T), to which ``relation`` was added."""
        mixed, logits = attend(self.qkv(tokens), self.heads, relation)
        return self.projection(mixed), logits


class Block(nn.Module):
    """A transformer block with the norm first.

    Args:
        layout: of the backbone.
        reuse: whether its MLP gets a context from the stage before.
        drop_path: of attention and MLP.
    """

    def __init__(self, layout: Layout, reuse: bool, drop_path: StochasticDepth) -> None:
        super().__init__()
        dim, hidden = layout.dim, layout.mlp_ratio * layout.dim
        inputs = dim + CONTEXT if reuse else dim
        self.norm1, self.norm2 = nn.LayerNorm(dim, layout.eps), nn.LayerNorm(inputs, layout.eps)
        self.attention = Attention(dim, layout.heads, bias=not layout.t2t)
        self.mlp = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, dim))
        # In the last block of stage 3 it changes no logit (the class token gets no context); the original has it and pays for it all the same.
        self.reuse = FeatureReuse(dim, layout.eps) if reuse else None
        self.drop_path = drop_path

    def forward(self, tokens: Tensor, relation: Tensor | None, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, D) after the block, and its attention logits."""
        attended, logits = self.attention(self.norm1(tokens), relation)
        tokens = tokens + self.drop_path(attended)
        seen = tokens if context is None else torch.cat([tokens, context.to(tokens.dtype)], dim=2)
        return tokens + self.drop_path(self.mlp(self.norm2(seen))), logits


class Stage(nn.Module):
    """One of the three vision transformers.

    Args:
        layout: of the backbone.
        index: 0, 1 or 2.
        num_classes: classes K.
        feature_reuse: read the tokens of the stage before.
        relation_reuse: read its attention logits, and leave one's own to the stage behind.
        drop_path: of the last block; it rises linearly from 0 at the first.
    """

    def __init__(self, layout: Layout, index: int, num_classes: int, *, feature_reuse: bool, relation_reuse: bool, drop_path: float) -> None:
        super().__init__()
        grid = layout.grid(index, layout.size, layout.size)
        self.embed = patch_embedding(layout, layout.windows[index])
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, layout.dim), std=0.02))
        self.positions = SinusoidalPositions(grid, layout.dim) if layout.t2t else LearnedPositions(grid, layout.dim)
        self.blocks = nn.ModuleList([Block(layout, feature_reuse and index > 0, drop) for drop in drop_paths(drop_path, layout.depth)])
        self.relation_reuse = RelationReuse(layout.depth, layout.heads) if relation_reuse and index > 0 else None
        self.resample: Resampling | None = None
        if index > 0 and (feature_reuse or relation_reuse):
            self.resample = Resampling(layout.grid(index - 1, layout.size, layout.size)[0], grid[0], layout.multiples[index - 1])
        self.leaves_relations = relation_reuse and index < len(layout.windows) - 1
        self.norm, self.head = nn.LayerNorm(layout.dim, layout.eps), nn.Linear(layout.dim, num_classes)

    def forward(self, images: Tensor, upstream: Handover | None = None) -> tuple[Tensor, Handover]:
        """Logits (B, K) and what is left to the next stage.

        Args:
            images: standardised, (B, 3, H, W).
            upstream: what the stage before left for the same images; None for the first stage.
        """
        features = self.embed(images)
        grid = (int(features.shape[2]), int(features.shape[3]))
        tokens = sequence(features, self.class_token, self.positions(grid))
        summands: Sequence[Tensor | None] = [None] * len(self.blocks)
        if self.relation_reuse is not None and upstream is not None:
            summands = self.relation_reuse(upstream.relations, self.resample, upstream.grid, grid)
        relations = []
        for block, relation in zip(self.blocks, summands, strict=True):
            assert isinstance(block, Block)
            context = None if upstream is None or block.reuse is None else block.reuse(upstream, self.resample, grid)
            tokens, logits = block(tokens, relation, context)
            if self.leaves_relations:
                relations.append(logits)
        left = torch.cat(relations, dim=1) if relations else None
        return self.head(self.norm(tokens[:, 0])), Handover(tokens, left, grid)


# ---- the cascade ----


class DVT(DynamicNetwork):
    """A cascade of three vision transformers with 7x7, 10x10 and 14x14 patches; for 32x32 images with 4x4, 6x6 and 8x8.

    Gates ``exit1`` and ``exit2``, one unit each, are charged with stages 2 and 3. An image stops at the first exit whose confidence, the
    largest softmax probability, exceeds that exit's T_k (at T_k exactly it goes on), else at the third, and gets that exit's logits.
    ``exits`` of the output holds the logits of all three, (B, 3, K). In skipped execution an exit that did not run for an image holds
    zeros, and the score of ``exit2`` repeats that of ``exit1`` where stage 2 did not run. In dense execution the logits are stage 3's.

    The buffer ``doubt``, 1 - T_k of the two exits, belongs to the checkpoint: :class:`gatewatt.callbacks.ExitBudget` calibrates it. Kept as
    a doubt, it resolves a T_k that float32 would round to 1.

    Args:
        backbone: ``t2t-12``, ``t2t-14`` or ``deit-s``, made for 224x224 images, or ``small-32`` or ``compact-32`` for 32x32 ones.
        num_classes: classes K.
        confidence: T_1 and T_2 in (0, 1) until they are calibrated.
        dim: channels of a token; the default is the backbone's, as for the next two.
        depth: blocks of each stage.
        heads: attention heads, a divisor of ``dim``.
        feature_reuse: give every MLP of stages 2 and 3 a context from the tokens of the stage before.
        relation_reuse: add what is learned from the attention logits of the stage before to those of every layer of stages 2 and 3.
        drop_path: stochastic depth in training, in [0, 1); it rises linearly from 0 at a stage's first block to this at its last.

    Raises:
        ValueError: for a backbone that does not exist or a value out of range.

    Example:
        >>> output = DVT("small-32", 10, dim=16, depth=1, heads=2)(torch.rand(2, 3, 32, 32))
        >>> output.logits.shape, output.exits.shape, list(output.gates)
        (torch.Size([2, 10]), torch.Size([2, 3, 10]), ['exit1', 'exit2'])
    """

    threshold: Tensor
    doubt: Tensor

    def __init__(
        self,
        backbone: BackboneName = "t2t-12",
        num_classes: int = 1000,
        *,
        confidence: Sequence[float] = (0.5, 0.5),
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        feature_reuse: bool = True,
        relation_reuse: bool = True,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        if backbone not in LAYOUTS:
            raise ValueError(f"backbone must be one of {', '.join(LAYOUTS)}, got {backbone!r}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if len(confidence) != 2 or not all(0 < each < 1 for each in confidence):
            raise ValueError(f"confidence must be two softmax probabilities in (0, 1), of exits 1 and 2, got {tuple(confidence)}")
        self.arguments = {
            "backbone": backbone,
            "num_classes": num_classes,
            "confidence": list(confidence),
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "feature_reuse": feature_reuse,
            "relation_reuse": relation_reuse,
            "drop_path": drop_path,
        }
        original = LAYOUTS[backbone]
        layout = replace(
            original,
            dim=original.dim if dim is None else dim,
            depth=original.depth if depth is None else depth,
            heads=original.heads if heads is None else heads,
        )
        if min(layout.dim, layout.depth, layout.heads) < 1 or layout.dim % layout.heads:
            raise ValueError(
                f"dim, depth and heads must be at least 1 and dim a multiple of heads, got {layout.dim}, {layout.depth} and {layout.heads}"
            )
        self.decision = hard
        self.normalize = Normalize(CIFAR_MEAN, CIFAR_STD) if original.size == 32 else Normalize(IMAGENET_MEAN, IMAGENET_STD)
        self.stages = nn.ModuleList(
            Stage(layout, index, num_classes, feature_reuse=feature_reuse, relation_reuse=relation_reuse, drop_path=drop_path)
            for index in range(len(layout.windows))
        )
        initialize_linear(self)
        self.charges = (Charge("stages.1", ("exit1",)), Charge("stages.2", ("exit2",)))
        self.register_buffer("doubt", torch.tensor([1 - each for each in confidence]))
        self.register_buffer("threshold", torch.tensor(0.5), persistent=False)

    @property
    def confidence(self) -> Tensor:
        """T_1 and T_2, the confidence above which an image stops, float64 (2,)."""
        return 1 - self.doubt.double()

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits (B, K), two gates of shape (B, 1), and the logits of all exits (B, 3, K)."""
        check_execution(execution)
        pixels = self.normalize(images)
        first, *others = self.stages
        found, left = first(pixels)
        logits, exits, score = found, [found], exit_score(found, self.confidence[0])
        executed = torch.ones_like(score)
        gates: dict[str, Gate] = {}
        # Which images of the batch pixels, found and left are of: all of them, but in skipped execution.
        rows = torch.arange(len(images), device=images.device)
        for index, stage in enumerate(others, start=1):
            name = f"exit{index}"
            if execution != "dense":
                # An image that stopped stays stopped, whatever a later exit would say.
                executed = executed * self.decision(name, score, self.threshold, training=self.training)
            gates[name] = Gate(score, self.threshold, executed.detach(), within=tuple(gates))
            if execution == "skipped":
                going = executed.flatten()[rows].nonzero().flatten()
                if len(going) < len(rows):
                    pixels, left, rows = pixels[going], left.at(going), rows[going]
            everyone, answers = len(rows) == len(images), torch.zeros_like(exits[0])
            if len(rows) > 0:
                found, left = stage(pixels, left)
                answers = found if everyone else answers.index_copy(0, rows, found)
                if index < len(others):
                    doubt = exit_score(found, self.confidence[index])
                    score = doubt if everyone else score.index_copy(0, rows, doubt)
            exits.append(answers)
            # Its end points are exact, so a decision of 0 or 1 selects to the last bit.
            logits = torch.lerp(logits, answers, executed.to(answers.dtype))
        return DynamicOutput(logits, gates, torch.stack(exits, dim=1))
