"""SACT and ACT: residual networks whose units halt, position by position or image by image.

Figurnov et al., "Spatially Adaptive Computation Time for Residual Networks" (CVPR 2017); ACT is Graves 2016 per image. After every unit of
a block but the last a head gives a halting score; a position runs on while its scores add up to less than 1 - eps, and the block's output
is the average of the states it saw (:mod:`gatewatt.gating.halting`). The gate of unit l + 1 asks whether the sum after unit l is small enough.

Always computed: stem, the first unit of each block with its halting head, and the classifier. In SACT a unit's first convolution runs on the
positions dilated by 3x3, which the second one reads, and the part of its head that looks at the whole image runs where any position does.

The CIFAR network standardises each image by itself, and gradients run through mean and deviation. Positions that halted keep their state, and
their later gates repeat the score with which they halted: each leads to what would have to change first. In dense execution a block's output is
its last state: the static network, in which nothing is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

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
from gatewatt.networks.layers import Normalize, global_average
from gatewatt.networks.positions import PositionConv, Positions, as_rows, dilate, replace_rows

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


# ---- residual units ----


class Style(NamedTuple):
    """Conventions of the CIFAR and of the ImageNet network."""

    imagenet: bool

    def norm(self, channels: int) -> nn.BatchNorm2d:
        """BatchNorm with the original's epsilon and decay: 0.9 for CIFAR, 0.997 for ImageNet (torch's momentum is 1 - decay)."""
        return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.003) if self.imagenet else nn.BatchNorm2d(channels, eps=1e-3, momentum=0.1)

    def activation(self) -> nn.Module:
        """ReLU, or for CIFAR a leaky ReLU of slope 0.1."""
        return nn.ReLU(inplace=True) if self.imagenet else nn.LeakyReLU(0.1, inplace=True)

    def normed(self, channels: int) -> tuple[nn.Module, nn.Module]:
        """BatchNorm and activation."""
        return self.norm(channels), self.activation()


class Subsample(nn.Module):
    """A shortcut without weights: the average of ``stride`` x ``stride`` pixels, and zeros for the new channels, half of them in front."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        front = (outputs - inputs) // 2
        self.stride, self.channels = stride, (front, outputs - inputs - front)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to fewer pixels and more channels."""
        # What lies beyond the border of an odd side does not count.
        pooled = functional.avg_pool2d(features, self.stride, ceil_mode=True, count_include_pad=False)
        return functional.pad(pooled, (0, 0, 0, 0, *self.channels))


class Unit(nn.Module):
    """A pre-activation residual unit, ``shortcut + convs(act(norm(x)))``.

    Args:
        inputs: channels in.
        width: channels of the 3x3 convolutions.
        stride: spatial stride.
        style: CIFAR (3x3, 3x3) or ImageNet (1x1, 3x3, 1x1 with four times ``width`` out).
        opening: the very first unit, whose input nothing has activated yet.
    """

    def __init__(self, inputs: int, width: int, stride: int, style: Style, opening: bool) -> None:
        super().__init__()
        self.outputs = 4 * width if style.imagenet else width
        self.preactivation = nn.Sequential(*style.normed(inputs))
        if style.imagenet:
            first, second = PositionConv(inputs, width, 1, 1, style.normed(width)), PositionConv(width, width, 3, stride, style.normed(width))
            self.convs = nn.Sequential(first, second, PositionConv(width, self.outputs, 1))
        else:
            self.convs = nn.Sequential(PositionConv(inputs, width, 3, stride, style.normed(width)), PositionConv(width, width, 3))
        # Whether the shortcut starts at the activated input or at the input itself.
        self.activated, self.shortcut = opening, nn.Identity()
        if style.imagenet and inputs != self.outputs:
            self.activated, self.shortcut = True, nn.Conv2d(inputs, self.outputs, 1, stride)
        elif stride != 1 or inputs != self.outputs:
            self.shortcut = Subsample(inputs, self.outputs, stride)

    shortcut: nn.Module

    def forward(self, features: Tensor) -> Tensor:
        """The whole unit, as a static network runs it."""
        activated = self.preactivation(features)
        return self.shortcut(activated if self.activated else features) + self.convs(activated)

    def residual(self, features: Tensor) -> Tensor:
        """What any unit of a block but its first adds to its input (B, C, H, W)."""
        return self.convs(self.preactivation(features))

    def residual_at(self, features: Tensor, where: Positions, dilated: Positions) -> Tensor:
        """The same at some positions only, as rows (P, C).

        Args:
            features: (B, C, H, W).
            where: the positions.
            dilated: the positions and their neighbours: what the 3x3 convolution behind the first one reads.
        """
        first, second, *others = self.layers
        rows = as_rows(self.preactivation(features))
        computed = first(rows if first.kernel == 3 else rows.index_select(0, dilated.flat), dilated)
        hidden = computed.new_zeros(len(rows), computed.shape[1]).index_copy(0, dilated.flat, computed)
        result: Tensor = second(hidden, where)
        for convolution in others:
            result = convolution(result, where)
        return result

    @property
    def layers(self) -> list[PositionConv]:
        """The convolutions in order."""
        return list(self.convs)  # type: ignore[arg-type]


# ---- halting heads ----


class ImageHalting(nn.Module):
    """ACT's head: global mean, BatchNorm (and on CIFAR the activation), one linear score of the image."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        norm = style.norm(channels)
        self.norm = nn.BatchNorm1d(channels, norm.eps, norm.momentum)
        self.activation = nn.Identity() if style.imagenet else style.activation()
        self.project = nn.Linear(channels, 1)

    def forward(self, features: Tensor) -> Tensor:
        """Halting logits (B, 1)."""
        return self.project(self.activation(self.norm(global_average(features))))


class PositionHalting(nn.Module):
    """SACT's head: a 3x3 convolution of the normalised maps, plus a linear score of their normalised mean that all positions share."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.norm = style.norm(channels)
        self.local = PositionConv(channels, 1, 3)
        self.mean_norm = nn.BatchNorm1d(channels, self.norm.eps, self.norm.momentum)
        self.overall = nn.Linear(channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Halting logits (B, HW)."""
        return self.local(self.norm(features)).flatten(1) + self.overall(self.mean_norm(global_average(features)))

    def at(self, features: Tensor, where: Positions, images: Tensor) -> Tensor:
        """The same at some positions only, (P,).

        Args:
            features: (B, C, H, W).
            where: the positions.
            images: indices of the images that have any of them.
        """
        local = self.local(as_rows(self.norm(features)), where)[:, 0]
        overall = self.overall(self.mean_norm(global_average(features[images])))[:, 0]
        return local + overall.new_zeros(len(features)).index_copy(0, images, overall)[where.image]


Head = PositionHalting | ImageHalting


# ---- what still runs of a batch ----


class Whole:
    """Everything is computed; in masked execution, what halted keeps its state.

    Args:
        mask: 0 or 1, (B, 1, H, W) or (B, 1, 1, 1); None where everything runs.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """Add the unit's residual to the features."""
        residual = unit.residual(features)
        return features + residual if self.mask is None else torch.addcmul(features, self.mask.to(features.dtype), residual)

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits (B, U)."""
        return head(features)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """Add the features, weighted (B, 1, H, W) or (B, 1, 1, 1), to the average."""
        weight = weight.to(features.dtype)
        # Fused where no trace counts operators: the FLOP tables do not know it.
        return average + weight * features if self.mask is None else torch.addcmul(average, weight, features)


class Nothing:
    """Everything has halted: called like :class:`Whole`, computes nothing."""

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits of scores that are 0, for all units alike."""
        return features.new_full((len(features), 1), -torch.inf)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """The average as it is."""
        return average


class RunningImages:
    """Some images still run: called like :class:`Whole`, computes these images.

    Args:
        rows: their indices.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """Gather the images, add the unit's residual, put them back."""
        gathered = features[self.rows]
        return replace_rows(features, self.rows, gathered + unit.residual(gathered))

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits (B, 1); minus infinity, a score of 0, for the others."""
        logits = head(features[self.rows])
        return logits.new_full((len(features), 1), -torch.inf).index_copy(0, self.rows, logits)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """Add these images, weighted."""
        share = weight[self.rows].to(average.dtype)
        return replace_rows(average, self.rows, average[self.rows] + share * features[self.rows])


class RunningPositions:
    """Some positions still run: called like :class:`Whole`, computes these positions.

    Args:
        running: 0 or 1, (B, H, W).
    """

    def __init__(self, running: Tensor) -> None:
        self.where, self.dilated = Positions.of(running), Positions.of(dilate(running))
        self.images = running.flatten(1).max(1).values.nonzero()[:, 0]

    def step(self, unit: Unit, features: Tensor) -> Tensor:
        """Add the unit's residual at the positions."""
        rows, index = as_rows(features), self.where.flat
        residual = unit.residual_at(features, self.where, self.dilated)
        return self.maps(replace_rows(rows, index, rows.index_select(0, index) + residual))

    def halting(self, head: Head, features: Tensor) -> Tensor:
        """Logits (B, HW); minus infinity, a score of 0, elsewhere."""
        assert isinstance(head, PositionHalting)
        images, height, width = self.where.shape
        logits = head.at(features, self.where, self.images)
        return logits.new_full((images * height * width,), -torch.inf).index_copy(0, self.where.flat, logits).view(images, -1)

    def add(self, average: Tensor, weight: Tensor, features: Tensor) -> Tensor:
        """Add the features at the positions, weighted."""
        rows, index = as_rows(average), self.where.flat
        share = weight.flatten().index_select(0, index).to(rows.dtype)[:, None]
        seen = as_rows(features).index_select(0, index)
        return self.maps(replace_rows(rows, index, rows.index_select(0, index) + share * seen))

    def maps(self, rows: Tensor) -> Tensor:
        """Rows of all positions as maps (B, C, H, W) in channels_last."""
        return rows.view(*self.where.shape, -1).permute(0, 3, 1, 2)


Part = Whole | Nothing | RunningImages | RunningPositions


def still_running(running: Tensor, spatial: bool, execution: Execution) -> Part:
    """What runs of the next unit.

    Args:
        running: 0 or 1, (B, H, W), or (B, 1, 1) per image.
        spatial: whether positions halt, or images.
        execution: masked, dense or skipped.
    """
    if execution != "skipped":
        return Whole(running[:, None] if execution == "masked" else None)
    places = running.nonzero()
    if len(places) == 0:
        return Nothing()
    if len(places) == running.shape[0] * running.shape[1] * running.shape[2]:
        return Whole()
    return RunningPositions(running) if spatial else RunningImages(places[:, 0])


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
