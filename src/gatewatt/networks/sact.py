"""SACT and ACT: residual networks whose units halt, position by position or image by image.

Figurnov et al., "Spatially Adaptive Computation Time for Residual Networks" (CVPR 2017); ACT is Graves 2016 per image. After every unit of
a block but the last a head gives a halting score; a position runs on while its scores add up to less than 1 - eps, and the block's output
is the average of the states it saw (:mod:`gatewatt.gating.halting`). The gate of unit l + 1 asks whether the sum after unit l is small enough.

Always computed: stem, the first unit of each block with its halting head, and the classifier. In SACT a unit's first convolution runs on the
positions dilated by 3x3, which the second one reads, and the part of its head that looks at the whole image runs where any position does.

The CIFAR network standardises each image by itself, and gradients run through mean and deviation. Positions that halted keep their state, and
their later gates repeat the score with which they halted: each leads to what would have to change first. In dense execution a block's output is
its last state: the static network, in which nothing is averaged.

Here are the blocks and the network; their units, halting heads and what runs them for a part of a batch are in
:mod:`gatewatt.networks.halting_units`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

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
from gatewatt.networks.halting_units import Head, ImageHalting, Part, PositionHalting, Style, Unit, Whole, still_running
from gatewatt.networks.layers import Normalize
from gatewatt.networks.positions import dilate

Halting = Literal["position", "image"]
Decide = Callable[[str, Tensor], Tensor]
"""Name and score (B, U) of a gate -> 0 or 1."""

HALTING_BIAS = -3.0  # scores start near sigmoid(-3) = 0.047: little halts early before training
TRUNCATED = 0.8796256610342398  # standard deviation of a standard normal distribution cut at -2 and 2


class Layout(NamedTuple):
    """What depends on the depth: units of each block, channels of the first, and the conventions of the data set."""

    units: tuple[int, ...]
    width: int
    imagenet: bool


IMAGENET_UNITS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


def sact_layout(depth: int) -> Layout:
    """The blocks for a depth: 50, 101, 152 and 200 are the ImageNet networks, any other 6n + 2 from 14 on (32, 110, ...) a CIFAR network.

    Raises:
        ValueError: for a depth that is neither.

    Example:
        >>> sact_layout(32).units
        (5, 5, 5)
    """
    if depth in IMAGENET_UNITS:
        return Layout(IMAGENET_UNITS[depth], 64, True)
    if depth < 14 or (depth - 2) % 6:
        names = ", ".join(map(str, IMAGENET_UNITS))
        raise ValueError(f"depth must be 6n + 2 with at least two units per block (CIFAR: 32, 110, ...) or one of {names}, got {depth}")
    return Layout(((depth - 2) // 6,) * 3, 16, False)


class Standardize(nn.Module):
    """``(x - mean) / max(std, 1 / sqrt(3HW))`` of each image, over its channels and pixels together; differentiable."""

    def forward(self, images: Tensor) -> Tensor:
        """Standardise images (B, 3, H, W) in [0, 1], each by itself."""
        centred = images - images.mean((1, 2, 3), keepdim=True)
        variance = centred.square().mean((1, 2, 3), keepdim=True)
        # The floor bounds the variance and not its root, which has no finite slope at a flat image.
        return centred * variance.clamp_min(1 / images[0].numel()).rsqrt()


# ---- blocks ----


class BlockOutput(NamedTuple):
    """What a block returns: features (B, C, H, W), its gates in execution order, and the ponder cost (B,), a mean over positions."""

    features: Tensor
    gates: dict[str, Gate]
    ponder: Tensor


class HaltingBlock(nn.Module):
    """Units of one resolution, each but the last with a halting head.

    Args:
        name: prefix of its gates' names.
        inputs: channels in.
        width: channels of the 3x3 convolutions.
        count: number of units, at least two.
        stride: of the first unit.
        style: CIFAR or ImageNet.
        halting: per ``position`` or per ``image``.
        eps: a position or image halts at a sum of 1 - eps.
        opening: the network's first block.
    """

    def __init__(
        self, name: str, inputs: int, width: int, count: int, stride: int, style: Style, halting: Halting, eps: float, opening: bool
    ) -> None:
        super().__init__()
        self.name, self.eps, self.spatial = name, eps, halting == "position"
        first = Unit(inputs, width, stride, style, opening)
        self.outputs = first.outputs
        self.units = nn.ModuleList([first, *(Unit(first.outputs, width, 1, style, False) for _ in range(count - 1))])
        self.heads = nn.ModuleList([(PositionHalting if self.spatial else ImageHalting)(first.outputs, style) for _ in range(count - 1)])

    def charges(self, path: str) -> list[Charge]:
        """What the gates pay for, the block being at ``path`` of the network."""
        charges = []
        for index, (unit, _) in enumerate(self.optional, start=1):
            gate, head = self.gate_name(index), f"{path}.heads.{index}"
            first, *others = (f"{path}.units.{index}.convs.{number}" for number in range(len(unit.convs)))
            charges.append(Charge(first, (f"{gate}_dilated" if self.spatial else gate,)))
            charges += [Charge(module, (gate,)) for module in others]
            if index == len(self.heads):
                continue  # the last unit has no head
            if self.spatial:
                charges += [Charge(f"{head}.local", (gate,)), Charge(f"{head}.overall", (f"{gate}_anywhere",))]
            else:
                charges.append(Charge(head, (gate,)))
        return charges

    @property
    def optional(self) -> list[tuple[Unit, Head]]:
        """The units after the first, each with the head that decides about it: that of the unit before."""
        return list(zip(list(self.units)[1:], self.heads, strict=True))  # type: ignore[arg-type]

    def gate_name(self, index: int) -> str:
        """Name of the gate of unit ``index``, counted from 0; its name counts from 1."""
        return f"{self.name}_unit{index + 1}"

    def forward(self, features: Tensor, execution: Execution, decide: Decide, threshold: Tensor) -> BlockOutput:
        """Run the block; its output is the average of its states, in dense execution the last of them.

        Args:
            features: (B, C, H, W).
            execution: masked, dense or skipped.
            decide: turns the name and the score (B, U) of a gate into 0 or 1.
            threshold: of every gate.
        """
        features = self.units[0](features)
        images, _, height, width = features.shape
        grid = (height, width) if self.spatial else (1, 1)
        # Scores and sums in float32 also under autocast: rounding would carry a sum across its threshold.
        kind = torch.promote_types(features.dtype, torch.float32)
        state = start_halting(torch.ones(images, grid[0] * grid[1], dtype=kind, device=features.device))
        part: Part = Whole()
        average, score = features, state.running
        gates: dict[str, Gate] = {}
        for index, (unit, head) in enumerate(self.optional, start=1):
            logits = part.halting(head, features).to(kind)
            halting = torch.sigmoid(logits)
            cumulative, score = accumulate(state, halting), go_on_score(state, logits, score, self.eps)
            go_on = torch.ones_like(score) if execution == "dense" else decide(self.gate_name(index), score)
            weight, state = advance(state, halting, cumulative, go_on)
            share = weight.view(images, 1, *grid)
            if execution != "dense":
                average = share.to(features.dtype) * features if index == 1 else part.add(average, share, features)
            gates |= self.gates(index, score, state.running, threshold, grid)
            part = still_running(state.running.view(images, *grid), self.spatial, execution)
            features = part.step(unit, features)
        none = torch.zeros_like(state.running)
        weight, state = advance(state, none, state.cumulative, none)
        output = features if execution == "dense" else part.add(average, weight.view(images, 1, *grid), features)
        return BlockOutput(output, gates, state.ponder.mean(1))

    def gates(self, index: int, score: Tensor, running: Tensor, threshold: Tensor, grid: tuple[int, int]) -> dict[str, Gate]:
        """The gate of unit ``index`` and those that follow it: (B, U) each."""
        name, executed = self.gate_name(index), running.detach()
        gates = {name: Gate(score, threshold, executed)}
        if self.spatial:
            scores, ran = (dilate(units.view(-1, *grid)).flatten(1) for units in (score, executed))
            gates[f"{name}_dilated"] = Gate(scores, threshold, ran, follows=name)
            if index < len(self.heads):
                # One number per image, written at every position: units of a follower match those of its gate.
                scores, ran = (units.max(1, keepdim=True).values.expand_as(units) for units in (score, executed))
                gates[f"{name}_anywhere"] = Gate(scores, threshold, ran, follows=name)
        return gates


class SACT(DynamicNetwork):
    """A pre-activation residual network in which positions (SACT) or images (ACT) halt within each block.

    Args:
        depth: see :func:`sact_layout`.
        num_classes: classes K; the original's ImageNet networks have 1001, one of them for the background.
        halting: ``position`` (SACT) or ``image`` (ACT).
        eps: what may be missing from a sum of 1 to halt, in (0, 1).
        width: channels of the first block's 3x3 convolutions; the default is the original's (16 for CIFAR, 64 for ImageNet).

    ``aux["ponder"]`` is the ponder cost of each image, (B,): N + R, a mean over positions and a sum over blocks.

    Raises:
        ValueError: for a depth or way of halting that does not exist, or a value out of range.

    Example:
        >>> output = SACT(depth=14, width=4)(torch.rand(2, 3, 32, 32))
        >>> [(name, tuple(gate.score.shape)) for name, gate in output.gates.items() if gate.follows is None]
        [('block1_unit2', (2, 1024)), ('block2_unit2', (2, 256)), ('block3_unit2', (2, 64))]
    """

    def __init__(self, depth: int = 32, num_classes: int = 10, *, halting: Halting = "position", eps: float = 0.01, width: int | None = None) -> None:
        super().__init__()
        layout = sact_layout(depth)
        if halting not in ("position", "image"):
            raise ValueError(f"halting must be position or image, got {halting!r}")
        if not 0 < eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {eps}")
        self.arguments = {"depth": depth, "num_classes": num_classes, "halting": halting, "eps": eps, "width": width}
        width = layout.width if width is None else width
        if width < 1 or num_classes < 2:
            raise ValueError(f"width must be at least 1 and num_classes at least 2, got {width} and {num_classes}")
        style = Style(layout.imagenet)
        self.normalize: nn.Module
        if layout.imagenet:
            self.normalize = Normalize((0.5,) * 3, (0.5,) * 3)
            self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3), nn.MaxPool2d(3, 2, 1))
        else:
            self.normalize = Standardize()
            self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1))
        blocks: list[HaltingBlock] = []
        channels = width
        for index, count in enumerate(layout.units):
            stride = 2 if index else 1
            blocks.append(
                HaltingBlock(
                    f"block{index + 1}", channels, width << index, count, stride=stride, style=style, halting=halting, eps=eps, opening=not index
                )
            )
            channels = blocks[-1].outputs
        self.blocks = nn.ModuleList(blocks)
        mean, norm = (nn.AdaptiveAvgPool2d(1),), style.normed(channels)
        # CIFAR normalises the mean, ImageNet takes the mean of what is normalised.
        self.head = nn.Sequential(*(norm + mean if layout.imagenet else mean + norm), nn.Flatten(), nn.Linear(channels, num_classes))
        initialize(self)
        self.decision = decision_named("hard")
        self.charges = tuple(charge for index, block in enumerate(blocks) for charge in block.charges(f"blocks.{index}"))
        self.overhead = tuple(f"blocks.{index}.heads.0" for index in range(len(blocks)))
        self.register_buffer("threshold", torch.tensor(0.5), persistent=False)

    threshold: Tensor

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits (B, K) and one gate per unit but the first of a block: (B, HW) for SACT, (B, 1) for ACT.

        A gate of SACT is followed by ``..._dilated``, where the unit's first convolution runs, and unless the unit is the block's last by
        ``..._anywhere``, the images in which any position runs.
        """
        check_execution(execution)

        def decide(name: str, score: Tensor) -> Tensor:
            return self.decision(name, score, self.threshold, training=self.training)

        features = self.stem(self.normalize(images))
        gates: dict[str, Gate] = {}
        ponder: list[Tensor] = []
        for block in self.blocks:
            output: BlockOutput = block(features, execution, decide, self.threshold)
            features = output.features
            gates |= output.gates
            ponder.append(output.ponder)
        return DynamicOutput(self.head(features), gates, aux={"ponder": torch.stack(ponder).sum(0)})


def initialize(network: SACT) -> None:
    """He initialisation, fan-in, from a normal distribution cut at two deviations; zero biases, and halting biases of -3."""
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            deviation = math.sqrt(2 / layer.weight[0].numel()) / TRUNCATED
            nn.init.trunc_normal_(layer.weight, 0, deviation, -2 * deviation, 2 * deviation)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    for name, parameter in network.named_parameters():
        if ".heads." in name and name.endswith(("project.bias", "local.layers.0.bias")):
            nn.init.constant_(parameter, HALTING_BIAS)
