"""Residual networks v1: the trunk that SkipNet gates, and its static counterpart.

He et al., "Deep Residual Learning" (CVPR 2016). CIFAR depths are 6n + 2 with basic blocks and 1x1 projection shortcuts; ImageNet depths
follow torchvision (stride on the 3x3 convolution of a bottleneck).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor, nn

from gatewatt.networks.layers import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, Normalize, global_average


class ResNetLayout(NamedTuple):
    """Depth-dependent shape of a residual network."""

    blocks: tuple[int, ...]
    width: int
    bottleneck: bool
    imagenet: bool


IMAGENET_LAYOUTS = {
    18: ResNetLayout((2, 2, 2, 2), 64, False, True),
    34: ResNetLayout((3, 4, 6, 3), 64, False, True),
    50: ResNetLayout((3, 4, 6, 3), 64, True, True),
    101: ResNetLayout((3, 4, 23, 3), 64, True, True),
    152: ResNetLayout((3, 8, 36, 3), 64, True, True),
}


def resnet_layout(depth: int) -> ResNetLayout:
    """The blocks of each group for a depth.

    18, 34, 50, 101 and 152 are the ImageNet networks; any other 6n + 2 (8, 14, 20, ..., 38, 74, 110) is a CIFAR network.

    Raises:
        ValueError: for a depth that is neither.

    Example:
        >>> resnet_layout(38).blocks
        (6, 6, 6)
    """
    if depth in IMAGENET_LAYOUTS:
        return IMAGENET_LAYOUTS[depth]
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6n + 2 (CIFAR: 20, 38, 74, 110, ...) or one of {', '.join(map(str, IMAGENET_LAYOUTS))}, got {depth}")
    return ResNetLayout(((depth - 2) // 6,) * 3, 16, False, False)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A bias-free convolution with "same" padding."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class ResidualBlock(nn.Module):
    """``relu(residual(x) + shortcut(x))``, in two parts so that the residual can be skipped and the shortcut kept.

    Args:
        inputs: channels in.
        width: channels of the 3x3 convolutions.
        stride: spatial stride of the block.
        bottleneck: 1x1, 3x3, 1x1 with four times ``width`` channels out, instead of 3x3, 3x3.
    """

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, width * (4 if bottleneck else 1), stride
        if bottleneck:
            layers = [conv(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(width, width, 3, stride), nn.BatchNorm2d(width)]
            layers += [nn.ReLU(inplace=True), conv(width, self.outputs, 1), nn.BatchNorm2d(self.outputs)]
        else:
            layers = [conv(inputs, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv(width, width, 3), nn.BatchNorm2d(width)]
        self.residual = nn.Sequential(*layers)
        projected = stride != 1 or inputs != self.outputs
        self.shortcut = nn.Sequential(conv(inputs, self.outputs, 1, stride), nn.BatchNorm2d(self.outputs)) if projected else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """The whole block, as a static network runs it."""
        return (self.residual(features) + self.shortcut(features)).relu_()


class ResNet(nn.Module):
    """A plain residual network; input pixels in [0, 1].

    Args:
        depth: see :func:`resnet_layout`.
        num_classes: classes K.
        width: channels of the first group; the default is the original's (16 for CIFAR, 64 for ImageNet).
    """

    def __init__(self, depth: int = 38, num_classes: int = 10, *, width: int | None = None) -> None:
        super().__init__()
        layout = resnet_layout(depth)
        width = layout.width if width is None else width
        if width < 1 or num_classes < 2:
            raise ValueError(f"width must be at least 1 and num_classes at least 2, got {width} and {num_classes}")
        if layout.imagenet:
            self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
            stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        else:
            self.normalize = Normalize(CIFAR_MEAN, CIFAR_STD)
            stem = [conv(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem)
        blocks: list[ResidualBlock] = []
        channels = width
        for group, count in enumerate(layout.blocks):
            for position in range(count):
                stride = 2 if group > 0 and position == 0 else 1
                blocks.append(ResidualBlock(channels, width << group, stride, layout.bottleneck))
                channels = blocks[-1].outputs
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, num_classes)
        initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W) in [0, 1]."""
        features = self.stem(self.normalize(images))
        for block in self.blocks:
            features = block(features)
        return self.head(global_average(features))


def initialize(module: nn.Module) -> None:
    """The original's initialisation: convolutions N(0, 2 / (k k out)), linear layers N(0, 2 / (in out)), biases untouched."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / (layer.kernel_size[0] * layer.kernel_size[1] * layer.out_channels)))
        elif isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / (layer.in_features * layer.out_features)))
