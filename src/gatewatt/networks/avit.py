"""A-ViT: tokens of a vision transformer that stop at different layers.

Yin et al., "A-ViT: Adaptive Tokens for Efficient Vision Transformer" (CVPR 2022). Channel 0 of a token after a layer is its halting signal,
h = sigmoid(scale * x_0 - center); a token runs the next layer while its scores add up to less than 1 - eps, and the prediction is read from
the class token's states averaged with their halting scores (:mod:`gatewatt.gating.halting`). The backbone is DeiT without distillation
(Touvron et al., ICML 2021), with no further parameters.

Always computed: patch embedding, first layer, head. A layer with n live tokens costs 12 n d^2 + 2 n^2 d MACs: the linear layers are charged
once to the layer's gate, the attention product twice.

Where the original's details would mislead an attack, they are mended: dead tokens are multiplied by a constant mask inside autograd, so that
no gradient passes a token that does not exist (the original overwrites values behind autograd's back), and a token's sum of scores is frozen
where it halts (the original adds what an emptied token gives): its later gates repeat the score with which it halted.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from gatewatt.gating import (
    Charge,
    DynamicNetwork,
    DynamicOutput,
    Execution,
    Gate,
    accumulate,
    advance,
    check_execution,
    decision_named,
    go_on_score,
    start_halting,
)
from gatewatt.networks.layers import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, Normalize
from gatewatt.networks.vit import attend, drop_paths, early_convolutions, initialize_linear, positions_at, sequence

Size = Literal["tiny", "small", "small-32", "compact-32"]


class Shape(NamedTuple):
    """What a size stands for."""

    image_size: int
    patch: int
    dim: int
    depth: int
    heads: int
    gate_center: float
    stem: int = 0


SIZES = {
    "tiny": Shape(224, 16, 192, 12, 3, 30.0),
    "small": Shape(224, 16, 384, 12, 6, 75.0),
    # Not of the paper: 64 patches of 4x4 pixels, otherwise like tiny.
    "small-32": Shape(32, 4, 192, 12, 3, 30.0),
    # Not of the paper: for the CPU, behind two convolutions.
    "compact-32": Shape(32, 4, 96, 6, 3, 30.0, stem=64),
}
MLP_RATIO = 4
NORM_EPS = 1e-6


class PerToken(nn.Module):
    """A module that treats every token alike, whether tokens come as whole images (B, N, d) or packed as the live ones of many (T, d)."""

    def extent(self, tokens: Tensor, whole: int) -> tuple[int, int]:
        """Tokens computed, and tokens of one whole image."""
        return tokens.shape[:-1].numel(), whole


class TokenLinear(PerToken, nn.Linear):
    """A linear layer that is told how many tokens a whole image has, so that hooks can tell how much of an image it computed."""

    def forward(self, tokens: Tensor, whole: int) -> Tensor:  # type: ignore[override]
        """(..., inputs) -> (..., outputs)."""
        return super().forward(tokens)


class MLP(PerToken):
    """Two linear layers with a GELU between them.

    Args:
        dim: channels of a token; the hidden layer has four times as many.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, tokens: Tensor, whole: int) -> Tensor:
        """(..., dim) -> (..., dim)."""
        return self.fc2(functional.gelu(self.fc1(tokens)))


class AttentionProduct(nn.Module):
    """What grows with the square of the tokens, :func:`~gatewatt.networks.vit.attend`, as a module of its own because it is charged by that law.

    Args:
        heads: number of heads.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor, whole: int, dead: Tensor | None = None) -> Tensor:
        """Mix the tokens of each image.

        Args:
            qkv: queries, keys and values side by side, (B, n, 3 d).
            whole: tokens of a whole image.
            dead: bool (B, n), tokens that nobody attends to; none by default.

        Returns:
            (B, n, d); meaningless where the token itself is dead.
        """
        # Finite, so that an image without any live token gives no NaN; exp of it is exactly zero beside any live key.
        added = None if dead is None else dead[:, None, None].to(qkv.dtype) * torch.finfo(qkv.dtype).min
        return attend(qkv, self.heads, added)[0]

    def extent(self, qkv: Tensor, whole: int, dead: Tensor | None = None) -> tuple[int, int]:
        """Pairs of tokens computed, and pairs of one whole image."""
        images, tokens = qkv.shape[:2]
        return images * tokens**2, whole**2


class Packing(NamedTuple):
    """The live tokens of a batch in one row after the other, and which of them attend to each other.

    Attributes:
        rows: where each of the T live tokens lies among all B * N, (T,).
        groups: per number n of live tokens, the packed rows of the k images that have so many, (k, n).
        back: where each packed row lies once the groups are concatenated, (T,).
    """

    rows: Tensor
    groups: list[Tensor]
    back: Tensor


def pack(alive: Tensor) -> Packing | None:
    """Pack the tokens that are alive, (B, N) of 0 or 1; None if there are none.

    Example:
        >>> packing = pack(torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0]]))
        >>> packing.rows.tolist(), [group.tolist() for group in packing.groups]
        ([0, 2, 4, 6, 7], [[[0, 1], [3, 4]], [[2]]])
    """
    rows = alive.flatten().nonzero().flatten()
    if len(rows) == 0:
        return None
    starts: dict[int, list[int]] = {}
    first = 0
    for count in (alive > 0).sum(1).tolist():
        if count:
            starts.setdefault(count, []).append(first)
            first += count
    groups = [torch.tensor(begins, device=rows.device)[:, None] + torch.arange(count, device=rows.device) for count, begins in starts.items()]
    return Packing(rows, groups, torch.cat([group.flatten() for group in groups]).sort().indices)


class Attention(nn.Module):
    """Multi-head self-attention in three parts of different price laws: ``qkv``, ``product``, ``proj``.

    Args:
        dim: channels of a token.
        heads: number of heads, a divisor of ``dim``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.qkv = TokenLinear(dim, 3 * dim)
        self.product = AttentionProduct(heads)
        self.proj = TokenLinear(dim, dim)

    def forward(self, tokens: Tensor, whole: int, dead: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Tokens of whole images (B, N, d) without their ``dead`` (B, N), or packed tokens (T, d) with their ``packing``."""
        qkv = self.qkv(tokens, whole)
        if packing is None:
            mixed = self.product(qkv, whole, dead)
        else:
            # One product per number of live tokens: exactly n^2 pairs per image, and no padding.
            mixed = torch.cat([self.product(qkv[group], whole).flatten(0, 1) for group in packing.groups])[packing.back]
        return self.proj(mixed, whole)


class Layer(nn.Module):
    """A pre-norm transformer layer.

    Args:
        dim: channels of a token.
        heads: number of heads.
        drop_path: of attention and MLP.
    """

    def __init__(self, dim: int, heads: int, drop_path: StochasticDepth) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = MLP(dim)
        self.drop_path = drop_path

    def forward(self, tokens: Tensor, whole: int, dead: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Arguments and shapes as for :class:`Attention`."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens), whole, dead, packing))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens), whole))


class AViT(DynamicNetwork):
    """A vision transformer whose tokens halt; one gate per layer but the first, with one unit per token, the class token first.

    ``masked`` and ``skipped`` execution average the class token over its layers; ``dense`` execution is the plain vision transformer with the
    same weights (h = 0 until the last layer), the static parent that a first stage of training fits.

    Parameters are named as in DeiT's released checkpoints (``cls_token``, ``pos_embed``, ``patch_embed.proj``, ``blocks.0.attn.qkv``, ...,
    ``norm``, ``head``), so those of the same size map one to one; what DeiT lacks are the buffers of the first layer and of the center::

        network.load_state_dict({**network.state_dict(), **deit})

    The published ``gate_center`` belongs to DeiT's channel 0. A network trained from scratch gives scores near 1e-13 with it, and no gradient
    to learn from: set it with :func:`halting_center`, or :class:`gatewatt.callbacks.halting_center.HaltingCenter` when the second stage starts.
    It is a buffer of the network and travels with its weights.

    Args:
        size: ``tiny`` and ``small`` for 224x224 (the paper's), ``small-32`` and ``compact-32`` for 32x32. The next six arguments replace parts of it.
        num_classes: classes K.
        image_size: side of the images that the positions are made for. Others of a multiple of ``patch`` are accepted; positions are then
            interpolated bilinearly.
        patch: side of a patch in pixels.
        dim: channels of a token.
        depth: layers L.
        heads: attention heads, a divisor of ``dim``.
        stem: channels of two 3x3 convolutions in front of the patches (:func:`~gatewatt.networks.vit.early_convolutions`), which then halve
            ``patch``; 0 for none, as in the paper.
        gate_scale: of channel 0 in the halting score (10 in the paper).
        gate_center: subtracted from the scaled channel 0 (30 for tiny, 75 for small in the paper).
        eps: a token halts at 1 - eps.
        drop_path: stochastic depth in training, in [0, 1); it rises linearly from 0 at the first layer to this at the last (0.1 in the paper).

    Raises:
        ValueError: for a size that does not exist or a value out of range.

    Example:
        >>> output = AViT("small-32", 10, dim=24, depth=3)(torch.rand(2, 3, 32, 32))
        >>> output.logits.shape, {name: tuple(gate.score.shape) for name, gate in output.gates.items()}
        (torch.Size([2, 10]), {'layer2': (2, 65), 'layer3': (2, 65)})
    """

    threshold: Tensor
    gate_center: Tensor

    def __init__(
        self,
        size: Size = "small-32",
        num_classes: int = 10,
        *,
        image_size: int | None = None,
        patch: int | None = None,
        dim: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        stem: int | None = None,
        gate_scale: float = 10.0,
        gate_center: float | None = None,
        eps: float = 0.01,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        given: dict[str, Any] = {
            "image_size": image_size,
            "patch": patch,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "stem": stem,
            "gate_center": gate_center,
        }
        self.arguments = {"size": size, "num_classes": num_classes, **given, "gate_scale": gate_scale, "eps": eps, "drop_path": drop_path}
        shape = SIZES[size]._replace(**{name: value for name, value in given.items() if value is not None})
        check_shape(shape, num_classes, gate_scale, eps)
        self.patch, self.side = shape.patch, shape.image_size // shape.patch
        self.gate_scale, self.eps = gate_scale, eps
        self.decision = decision_named("hard")
        self.normalize = Normalize(CIFAR_MEAN, CIFAR_STD) if shape.image_size <= 64 else Normalize(IMAGENET_MEAN, IMAGENET_STD)
        # DeiT's name for the projection; without a stem there is nothing else in it.
        self.patch_embed = nn.ModuleDict({"stem": early_convolutions(shape.stem)} if shape.stem else {})
        window = shape.patch // 2 if shape.stem else shape.patch
        self.patch_embed["proj"] = nn.Conv2d(shape.stem or 3, shape.dim, window, window)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2 + 1, shape.dim))
        self.blocks = nn.ModuleList([Layer(shape.dim, shape.heads, drop) for drop in drop_paths(drop_path, shape.depth)])
        self.norm = nn.LayerNorm(shape.dim, eps=NORM_EPS)
        self.head = nn.Linear(shape.dim, num_classes)
        for embedding in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(embedding, std=0.02)
        initialize_linear(self)
        charges = []
        for index in range(1, shape.depth):
            block, gate = f"blocks.{index}", f"layer{index + 1}"
            charges += [Charge(f"{block}.{module}", (gate,)) for module in ("attn.qkv", "attn.proj", "mlp")]
            charges.append(Charge(f"{block}.attn.product", (gate, gate)))
        self.charges = tuple(charges)
        self.register_buffer("gate_center", torch.tensor(float(shape.gate_center)))
        self.register_buffer("threshold", torch.tensor(0.5), persistent=False)

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits (B, K), one gate (B, N) per layer after the first, N = 1 + number of patches.

        ``aux`` holds ``ponder`` (B,), the mean of N + R over the image's tokens; ``halting`` (B, L), the mean halting score after each layer
        over the patch tokens that ran it, 0 where there were none; and ``live`` (B, L), how many they were. A dense pass halts nowhere.

        Raises:
            ValueError: for an unknown execution, or images that patches do not tile.
        """
        check_execution(execution)
        hidden = self.embed(images)
        whole = int(hidden.shape[1])
        state = start_halting(self.halting_logits(hidden))
        score = state.running
        averaged = torch.zeros_like(hidden[:, 0])
        gates: dict[str, Gate] = {}
        means, counts = [], []
        for index, block in enumerate(self.blocks, start=1):
            if index == 1 or execution == "dense":
                hidden = block(hidden, whole)
            else:
                hidden = (run_masked if execution == "masked" else run_skipped)(block, hidden, state.running, whole)
            logits = self.halting_logits(hidden)
            halting = torch.zeros_like(state.running) if execution == "dense" else torch.sigmoid(logits)
            patches = state.running[:, 1:]
            counts.append(patches.sum(1))
            means.append((halting[:, 1:] * patches).sum(1) / counts[-1].clamp_min(1))
            cumulative = accumulate(state, halting)
            # After the last layer every token stops, as if its h were 1.
            go_on = torch.zeros_like(state.running)
            if index < len(self.blocks):
                score, name = go_on_score(state, logits, score, self.eps), f"layer{index + 1}"
                go_on = torch.ones_like(score) if execution == "dense" else self.decision(name, score, self.threshold, training=self.training)
                gates[name] = Gate(score, self.threshold, (state.running * go_on).detach())
            weight, state = advance(state, halting, cumulative, go_on)
            averaged = averaged + weight[:, :1] * hidden[:, 0]
        aux = {"ponder": state.ponder.mean(1), "halting": torch.stack(means, 1), "live": torch.stack(counts, 1)}
        return DynamicOutput(self.head(self.norm(averaged)), gates, aux=aux)

    def embed(self, images: Tensor) -> Tensor:
        """Class token and patches with their positions, (B, N, d)."""
        if images.shape[2] % self.patch or images.shape[3] % self.patch:
            raise ValueError(f"height and width must be multiples of the patch size {self.patch}, got {tuple(images.shape[2:])}")
        patches = self.normalize(images)
        for module in self.patch_embed.values():
            patches = module(patches)
        positions = positions_at((int(patches.shape[2]), int(patches.shape[3])), self.pos_embed, (self.side, self.side))
        return sequence(patches, self.cls_token, positions)

    def halting_logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, N) of the halting scores of all tokens (B, N, d), in float32 or better: half precision would saturate the scores."""
        signal = hidden[..., 0]
        return self.gate_scale * (signal if signal.dtype == torch.float64 else signal.float()) - self.gate_center

    def signal(self, images: Tensor) -> Tensor:
        """Channel 0 of every token after every layer but the last if none halts, (B, L - 1, N): what :func:`halting_center` looks at."""
        hidden, signals = self.embed(images), []
        for block in list(self.blocks)[:-1]:
            hidden = block(hidden, hidden.shape[1])
            signals.append(hidden[..., 0])
        return torch.stack(signals, dim=1)


def run_masked(block: nn.Module, hidden: Tensor, running: Tensor, whole: int) -> Tensor:
    """Compute the layer for all tokens (B, N, d); those that do not run are attended by none and end as zeros."""
    # `running` is a constant for autograd, so a dead token passes no gradient on.
    return block(hidden, whole, running == 0) * running.to(hidden.dtype)[..., None]


def run_skipped(block: nn.Module, hidden: Tensor, running: Tensor, whole: int) -> Tensor:
    """Compute the layer for the tokens that run, and only for them: pack, run, scatter onto zeros."""
    packing = pack(running)
    emptied = torch.zeros_like(hidden)
    if packing is None:
        return emptied
    tokens = block(hidden.flatten(0, 1)[packing.rows], whole, None, packing)
    return emptied.flatten(0, 1).index_copy(0, packing.rows, tokens.to(hidden.dtype)).view(hidden.shape)


def halting_center(signal: Tensor, gate_scale: float, mean: float = 0.03) -> float:
    """The center at which halting scores are ``mean`` on average: sigmoid(gate_scale * signal - center), by bisection.

    A mean of 0.01 to 0.05 lets few tokens halt at first and gives all of them a gradient.

    Args:
        signal: channel 0 of tokens of a network whose tokens do not halt, any shape (:meth:`AViT.signal`).
        gate_scale: the network's.
        mean: in (0, 1).

    Raises:
        ValueError: if ``mean`` is outside (0, 1), or the signal is empty or not finite.

    Example:
        >>> round(halting_center(torch.tensor([0.2, 0.2]), gate_scale=10.0, mean=0.5), 6)
        2.0
    """
    if not 0 < mean < 1:
        raise ValueError(f"mean must be in (0, 1), got {mean}")
    if signal.numel() == 0 or not bool(torch.isfinite(signal).all()):
        raise ValueError("the halting signal must be finite and not empty: no center can be found for these images and weights")
    logits = gate_scale * signal.detach().double()
    offset = torch.logit(torch.tensor(mean, dtype=torch.float64)).item()
    # With the lower one every score is at least the mean, with the higher one at most.
    low, high = (bound.item() - offset for bound in logits.aminmax())
    for _ in range(60):
        middle = (low + high) / 2
        if torch.sigmoid(logits - middle).mean() > mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def check_shape(shape: Shape, num_classes: int, gate_scale: float, eps: float) -> None:
    """Raise for a network that cannot be built."""
    if min(shape.image_size, shape.patch, shape.dim, shape.heads) < 1 or shape.depth < 2:
        raise ValueError(f"image_size, patch, dim and heads must be at least 1 and depth at least 2, got {tuple(shape[:5])}")
    if shape.image_size % shape.patch:
        raise ValueError(f"patch must divide image_size, got {shape.patch} and {shape.image_size}")
    if shape.stem < 0 or (shape.stem and shape.patch % 2):
        raise ValueError(f"stem must be at least 0, and patch even behind one that is not 0, got {shape.stem} and {shape.patch}")
    if shape.dim % shape.heads:
        raise ValueError(f"heads must divide dim, got {shape.heads} and {shape.dim}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if not gate_scale > 0 or not 0 < eps < 1:
        raise ValueError(f"gate_scale must be positive and eps in (0, 1), got {gate_scale} and {eps}")
