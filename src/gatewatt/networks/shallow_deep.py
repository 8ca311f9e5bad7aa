"""Shallow-Deep Networks (SDN): a CNN with internal classifiers, which ends for an image as soon as one of them is confident.

Kaya et al., "Shallow-Deep Networks: Understanding and Mitigating Network Overthinking" (ICML 2019). Six internal classifiers (five in
MobileNet) near 15, 30, 45, 60, 75 and 90 % of the CNN's cost cut it into segments. The doubt that exit i leaves is the score of gate i, which
decides whether segment i + 1 runs; an image that stopped stays stopped, so what was executed is the product of the decisions so far.

Always computed: everything up to the first internal classifier, and that classifier. Every later segment is charged with the classifier
at its end, the last one with the rest of the CNN and its own classifier.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gatewatt.gating import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, check_execution, exit_score, hard
from gatewatt.networks.layers import IMAGENET_MEAN, IMAGENET_STD, Normalize
from gatewatt.networks.resnet import ResidualBlock, conv, resnet_layout

BackboneName = Literal["resnet-20", "resnet-56", "vgg-16", "wrn-32-4", "mobilenet"]
Fallback = Literal["confident", "last"]


class Block(NamedTuple):
    """A piece of a CNN behind which a classifier may stand."""

    module: nn.Module
    channels: int
    stride: int  # pixels of the image per position of the output, along one side


class Backbone(NamedTuple):
    """A CNN as its pieces in order.

    Attributes:
        stem: layers before the first block.
        blocks: what classifiers can be put between.
        exits: 0-based indices of the blocks that an internal classifier follows.
        head: the CNN's own classifier, from the last block's output to logits.
    """

    stem: list[nn.Module]
    blocks: list[Block]
    exits: tuple[int, ...]
    head: nn.Module


class MixedPooling(nn.Module):
    """``a max-pooling + (1 - a) average-pooling`` with one learned, unbounded a, drawn from [0, 1) at first.

    Args:
        kernel: side of the square windows, which do not overlap.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.maximum, self.average = nn.MaxPool2d(kernel), nn.AvgPool2d(kernel)
        self.share = nn.Parameter(torch.rand(()))

    def forward(self, features: Tensor) -> Tensor:
        """Pool features (B, C, H, W)."""
        return self.share * self.maximum(features) + (1 - self.share) * self.average(features)


def internal_classifier(channels: int, side: int, num_classes: int) -> nn.Sequential:
    """Mixed pooling to about 4x4 positions, then one linear layer; maps of less than 8x8 are not pooled.

    Example:
        >>> internal_classifier(16, 32, 10)[-1]
        Linear(in_features=256, out_features=10, bias=True)
    """
    kernel = max(side // 4, 1)
    pooled = side // kernel
    # A window of one position would leave every map as it is, whatever a.
    pooling = [MixedPooling(kernel)] if kernel > 1 else []
    return nn.Sequential(*pooling, nn.Flatten(), nn.Linear(channels * pooled**2, num_classes))


class Segment(nn.Module):
    """A part of the CNN and the classifier at its end, which run together or not at all."""

    def __init__(self, body: nn.Sequential, exit: nn.Module) -> None:
        super().__init__()
        self.body, self.exit = body, exit

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features for the next segment, and logits (B, K)."""
        features = self.body(features)
        return features, self.exit(features)


# ---- the CNNs ----


def norm_relu(channels: int) -> list[nn.Module]:
    """BatchNorm and ReLU."""
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def average_head(channels: int, num_classes: int) -> list[nn.Module]:
    """Mean over positions and one linear layer."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]


def resnet(depth: int, exits: tuple[int, ...], width: int, num_classes: int) -> Backbone:
    """A CIFAR ResNet with basic blocks and 1x1 projections; ``width`` channels in the first group (16 in the original)."""
    blocks: list[Block] = []
    channels = width
    for group, count in enumerate(resnet_layout(depth).blocks):
        for position in range(count):
            block = ResidualBlock(channels, width << group, 2 if group and not position else 1, bottleneck=False)
            channels = block.outputs
            blocks.append(Block(block, channels, 1 << group))
    return Backbone([conv(3, width, 3), *norm_relu(width)], blocks, exits, nn.Sequential(*average_head(channels, num_classes)))


VGG_CHANNELS, VGG_POOLED = (1, 1, 2, 2, 4, 4, 4, 8, 8, 8, 8, 8, 8), (1, 3, 6, 9, 12)
"""VGG-16: channels of each convolution in units of 64, and which of them a 2x2 max-pooling follows."""


def vgg(width: int, num_classes: int, size: int) -> Backbone:
    """VGG-16 with BatchNorm and a head of two layers of 8 ``width`` units (512); nothing but dropout lies between its last two layers."""
    blocks: list[Block] = []
    channels, stride = 3, 1
    for index, factor in enumerate(VGG_CHANNELS):
        layers: list[nn.Module] = [conv(channels, factor * width, 3), *norm_relu(factor * width)]
        channels = factor * width
        if index in VGG_POOLED:
            layers.append(nn.MaxPool2d(2))
            stride *= 2
        blocks.append(Block(nn.Sequential(*layers), channels, stride))
    hidden = 8 * width
    first = [nn.Flatten(), nn.Linear(channels * (size // stride) ** 2, hidden), nn.ReLU(inplace=True), nn.Dropout(0.5)]
    head = nn.Sequential(*first, nn.Linear(hidden, hidden), nn.Dropout(0.5), nn.Linear(hidden, num_classes))
    for layer in head.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.zeros_(layer.bias)
    return Backbone([], blocks, (1, 3, 5, 6, 8, 9), head)


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, with dropout 0.3 between them; the second one takes the stride.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: of the second convolution and of the 1x1 shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = [*norm_relu(inputs), conv(inputs, outputs, 3), nn.Dropout(0.3)]
        self.residual = nn.Sequential(*first, *norm_relu(outputs), conv(outputs, outputs, 3, stride))
        self.shortcut = conv(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """The whole block."""
        return self.residual(features) + self.shortcut(features)


def wide_resnet(width: int, num_classes: int) -> Backbone:
    """The original's WideResNet-32-4: three groups of five blocks; ``width`` channels in the first group (64), a quarter of it in the stem."""
    blocks: list[Block] = []
    channels = width // 4
    stem: list[nn.Module] = [conv(3, channels, 3)]
    for group in range(3):
        for position in range(5):
            block = WideBlock(channels, width << group, 2 if group and not position else 1)
            channels = width << group
            blocks.append(Block(block, channels, 1 << group))
    head = nn.Sequential(*norm_relu(channels), *average_head(channels, num_classes))
    return Backbone(stem, blocks, (2, 4, 6, 8, 10, 12), head)


MOBILENET = ((1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), *[(8, 1)] * 5, (16, 2), (16, 1))
"""MobileNet v1 for 32x32 images: channels of each block in units of 64, and its stride."""


def mobilenet(width: int, num_classes: int) -> Backbone:
    """MobileNet v1 of depthwise and pointwise convolutions; ``width`` channels in the first block (64), half of it in the stem."""
    blocks: list[Block] = []
    channels, scale = width // 2, 1
    stem = [conv(3, channels, 3), *norm_relu(channels)]
    for factor, stride in MOBILENET:
        depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        pointwise = conv(channels, factor * width, 1)
        module = nn.Sequential(depthwise, *norm_relu(channels), pointwise, *norm_relu(factor * width))
        channels, scale = factor * width, scale * stride
        blocks.append(Block(module, channels, scale))
    return Backbone(stem, blocks, (2, 4, 6, 8, 11), nn.Sequential(*average_head(channels, num_classes)))


class Original(NamedTuple):
    """A backbone as its authors have it.

    Attributes:
        width: channels of the first group of blocks.
        stride: pixels of the image per position of the last map, along one side.
        build: the CNN of a width, a number of classes and an image size.
    """

    width: int
    stride: int
    build: Callable[[int, int, int], Backbone]


BACKBONES: dict[str, Original] = {
    "resnet-20": Original(16, 4, lambda width, classes, size: resnet(20, (0, 1, 3, 4, 6, 7), width, classes)),
    "resnet-56": Original(16, 4, lambda width, classes, size: resnet(56, (3, 7, 11, 15, 19, 23), width, classes)),
    "vgg-16": Original(64, 32, vgg),
    "wrn-32-4": Original(64, 4, lambda width, classes, size: wide_resnet(width, classes)),
    "mobilenet": Original(64, 16, lambda width, classes, size: mobilenet(width, classes)),
}


def initialize_convolutions(module: nn.Module) -> None:
    """Convolutions N(0, 2 / (k k out)), out counted per group; the rest as it is."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            outputs = layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels // layer.groups
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / outputs))


# ---- the network ----


class ShallowDeep(DynamicNetwork):
    """A CNN whose segments run until an exit is confident.

    Gate ``exit<i>`` holds the doubt of internal classifier i as its score (:func:`~gatewatt.gating.exit_score`) and is charged with segment
    i + 1. An image stops at the first exit whose confidence, the largest softmax probability, exceeds ``confidence``, and gets that exit's
    logits. One that no exit is sure about, the CNN's own classifier included, gets the logits of its most confident exit, as in the
    original, or those of the CNN (``fallback``).

    ``exits`` of the output holds the logits of every classifier in execution order, the CNN's own last, shape (B, E, K). In skipped execution
    an exit that did not run for an image holds zeros, and the score of its gate repeats the last one that was computed. In dense
    execution the logits are those of the CNN.

    Args:
        backbone: ``resnet-56``, ``vgg-16``, ``wrn-32-4`` or ``mobilenet`` of the original, or ``resnet-20``, a small one for first experiments
            with classifiers at similar shares of its cost.
        num_classes: classes K.
        confidence: q in (0, 1), at which an exit is sure. It is no weight: a trained network may be measured at any.
        fallback: ``confident`` or ``last``, which exit answers for an image that none is sure about.
        train_backbone: False trains the internal classifiers alone, on a CNN that is trained already: its parameters take no gradient, and it
            stays in eval mode whatever the mode of the network. (In the original's train mode its BatchNorm statistics move on and its dropout
            is active.)
        size: side of the images; the linear classifiers hold for one size. A multiple of 4 (ResNets), 16 (MobileNet) or 32 (VGG).
        mean: of each channel in [0, 1]; ImageNet's, as the original has it for CIFAR-10. For CIFAR-100 it takes (0.507, 0.487, 0.441).
        std: standard deviation of each channel; for CIFAR-100 (0.267, 0.256, 0.276).
        width: channels of the first group of blocks, all others in proportion; the default is the original's.

    Raises:
        ValueError: for a backbone, fallback, confidence, size or width that does not exist, or an image of another size.

    Example:
        >>> output = ShallowDeep("resnet-20", num_classes=10)(torch.rand(2, 3, 32, 32))
        >>> output.logits.shape, output.exits.shape, list(output.gates)
        (torch.Size([2, 10]), torch.Size([2, 7, 10]), ['exit1', 'exit2', 'exit3', 'exit4', 'exit5', 'exit6'])
    """

    threshold: Tensor

    def __init__(
        self,
        backbone: BackboneName = "resnet-56",
        num_classes: int = 10,
        *,
        confidence: float = 0.5,
        fallback: Fallback = "confident",
        train_backbone: bool = True,
        size: int = 32,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        width: int | None = None,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        original = BACKBONES[backbone]
        if size < original.stride or size % original.stride:
            raise ValueError(f"size must be a multiple of {original.stride} for {backbone}, got {size}")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must be in (0, 1), a softmax probability, got {confidence}")
        if fallback not in ("confident", "last"):
            raise ValueError(f"fallback must be confident or last, got {fallback!r}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if width is not None and (width < 4 or width % 4):
            raise ValueError(f"width must be a positive multiple of 4, got {width}")
        self.arguments = {
            "backbone": backbone,
            "num_classes": num_classes,
            "confidence": confidence,
            "fallback": fallback,
            "train_backbone": train_backbone,
            "size": size,
            "mean": list(mean),
            "std": list(std),
            "width": width,
        }
        self.confidence, self.fallback, self.train_backbone, self.size = confidence, fallback, train_backbone, size
        self.decision = hard
        self.normalize = Normalize(mean, std)
        pieces = original.build(width or original.width, num_classes, size)
        self.segments = nn.ModuleList(segmented(pieces, num_classes, size))
        initialize_convolutions(self)
        self.charges = tuple(Charge(f"segments.{index}", (f"exit{index}",)) for index in range(1, len(self.segments)))
        self.register_buffer("threshold", torch.tensor(0.5), persistent=False)
        if not train_backbone:
            for module in self.frozen:
                module.requires_grad_(False)
            self.train()

    @property
    def frozen(self) -> list[nn.Module]:
        """The modules of the plain CNN, if the internal classifiers are trained alone; else none."""
        if self.train_backbone:
            return []
        segments = list(self.segments)
        return [*(segment.get_submodule("body") for segment in segments), segments[-1].get_submodule("exit")]

    def train(self, mode: bool = True) -> ShallowDeep:
        """Set the mode of everything that is trained; a frozen CNN stays in eval mode."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits (B, K), one gate of shape (B, 1) per internal classifier, and the logits of all exits (B, E, K)."""
        check_execution(execution)
        if tuple(images.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"this network is built for {self.size}x{self.size} images, got {tuple(images.shape)}; set its size")
        first, *others = self.segments
        features, logits = first(self.normalize(images))
        score = exit_score(logits, self.confidence)
        exits, scores = [logits], [score]
        gates: dict[str, Gate] = {}
        executed = torch.ones_like(score)
        # Which images of the batch `features` are of; all of them, but in skipped execution.
        rows = torch.arange(len(images), device=images.device)
        for index, segment in enumerate(others, start=1):
            name = f"exit{index}"
            if execution != "dense":
                decided = self.decision(name, score, self.threshold, training=self.training)
                # An image that stopped stays stopped, whatever a later exit would say.
                executed = executed * decided.detach()
            gates[name] = Gate(score, self.threshold, executed, within=tuple(gates))
            if execution == "skipped":
                going = executed.flatten()[rows].nonzero().flatten()
                if len(going) < len(rows):
                    features, rows = features[going], rows[going]
            logits = torch.zeros_like(exits[0])
            if len(rows) > 0:
                features, found = segment(features)
                everyone = len(rows) == len(images)
                logits = found if everyone else logits.index_copy(0, rows, found)
                doubt = exit_score(found, self.confidence)
                score = doubt if everyone else score.index_copy(0, rows, doubt)
            exits.append(logits)
            scores.append(score)
        stacked = torch.stack(exits, dim=1)
        if execution == "dense":
            return DynamicOutput(logits, gates, stacked)
        ran = torch.cat([gate.executed for gate in gates.values()], dim=1).sum(1).long()
        return DynamicOutput(self._answer(stacked, torch.cat(scores, dim=1), ran), gates, stacked)

    def _answer(self, exits: Tensor, scores: Tensor, last: Tensor) -> Tensor:
        """Logits (B, K) of the exit that answers for each image.

        Args:
            exits: logits (B, E, K).
            scores: doubt of every exit as a score, (B, E).
            last: 0-based index (B,) of the exit at which the image stopped.
        """
        if self.fallback == "confident":
            unsure = (last == exits.shape[1] - 1) & (scores[:, -1] >= self.threshold)
            last = torch.where(unsure, scores.neg().argmax(1), last)
        return exits.gather(1, last[:, None, None].expand(-1, 1, exits.shape[2])).squeeze(1)


def segmented(pieces: Backbone, num_classes: int, size: int) -> list[Segment]:
    """Cut a CNN behind every block that an internal classifier follows."""
    segments = []
    body = list(pieces.stem)
    for index, block in enumerate(pieces.blocks):
        body.append(block.module)
        if index in pieces.exits:
            segments.append(Segment(nn.Sequential(*body), internal_classifier(block.channels, size // block.stride, num_classes)))
            body = []
    return [*segments, Segment(nn.Sequential(*body), pieces.head)]
