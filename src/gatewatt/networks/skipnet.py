"""SkipNet: a gate before each residual block decides, from the features so far, whether the block runs.

Wang et al., "SkipNet: Learning Dynamic Routing in Convolutional Networks" (ECCV 2018). The supervised stage (SP) uses straight-through
decisions, the reinforcement stage (HRL) sampled ones; parameters are named alike, so an SP checkpoint starts the HRL stage.

Always computed: stem, first block, projection shortcuts (also of skipped blocks), head, and the gates. The gate of block i reads the output
of block i - 1. The last block's output has no gate: the original computes one and drops it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gatewatt.gating import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, check_execution, decision_named
from gatewatt.networks.layers import global_average
from gatewatt.networks.resnet import ResidualBlock, ResNet, conv, initialize, resnet_layout

GateKind = Literal["recurrent", "feedforward1", "feedforward2"]
HIDDEN = 10  # width of the gate embedding and of its LSTM


class RecurrentGates(nn.Module):
    """One embedding per gate, one LSTM and projection shared by all; the state runs from block to block.

    Unrolled with :class:`torch.nn.LSTMCell`: cuDNN's fused LSTM refuses a backward pass in eval mode, which every attack needs.

    Args:
        channels: channels of the features that each gate reads.
        imagenet: initialise the shared controller with Xavier-normal weights and zero biases, as the ImageNet release does.
    """

    def __init__(self, channels: list[int], imagenet: bool) -> None:
        super().__init__()
        self.embed = nn.ModuleList([nn.Conv2d(count, HIDDEN, 1) for count in channels])
        self.controller = nn.LSTMCell(HIDDEN, HIDDEN)
        self.projection = nn.Linear(HIDDEN, 1)
        initialize(self)
        if imagenet:
            for parameter in (*self.controller.parameters(), *self.projection.parameters()):
                nn.init.xavier_normal_(parameter) if parameter.ndim > 1 else nn.init.zeros_(parameter)

    def forward(self, features: Tensor, index: int, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Score (B, 1) of gate ``index`` and the recurrent state after it."""
        embedding = self.embed[index](global_average(features)[:, :, None, None]).flatten(1)
        state = self.controller(embedding, state)
        return torch.sigmoid(self.projection(state[0])), state


class FeedForwardGate(nn.Module):
    """A gate of its own convolutions; the score is the softmax of the second class.

    Args:
        channels: channels of the features.
        kind: ``feedforward1`` (FFGate-I: pool, conv, strided conv) or ``feedforward2`` (FFGate-II: strided conv).
    """

    def __init__(self, channels: int, kind: GateKind) -> None:
        super().__init__()
        first = [nn.MaxPool2d(2), conv(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()] if kind == "feedforward1" else []
        strided = [conv(channels, channels, 3, 2), nn.BatchNorm2d(channels), nn.ReLU()]
        self.features = nn.Sequential(*first, *strided)
        self.projection = nn.Conv2d(channels, 2, 1)
        initialize(self)

    def forward(self, features: Tensor) -> Tensor:
        """Score (B, 1)."""
        pooled = global_average(self.features(features))[:, :, None, None]
        return torch.softmax(self.projection(pooled).flatten(1), dim=1)[:, 1:]


class FeedForwardGates(nn.Module):
    """Independent :class:`FeedForwardGate` per block; called like :class:`RecurrentGates`, without a state."""

    def __init__(self, channels: list[int], kind: GateKind) -> None:
        super().__init__()
        self.gates = nn.ModuleList([FeedForwardGate(count, kind) for count in channels])

    def forward(self, features: Tensor, index: int, state: None) -> tuple[Tensor, None]:
        """Score (B, 1) of gate ``index``."""
        return self.gates[index](features), None


class SkipNet(DynamicNetwork):
    """A residual network whose blocks are gated, all but the first.

    Args:
        depth: 6n + 2 for CIFAR (38, 74, 110), or 18, 34, 50, 101, 152 for ImageNet.
        num_classes: classes K.
        gate: ``recurrent`` (all released checkpoints), ``feedforward1`` or ``feedforward2``.
        decision: ``straight_through`` (SP), ``sampled`` (HRL) or ``hard``.
        width: channels of the first group; the default is the original's.

    Raises:
        ValueError: for a depth, gate or decision that does not exist.

    Example:
        >>> output = SkipNet(depth=8, num_classes=10)(torch.rand(2, 3, 32, 32))
        >>> output.logits.shape, list(output.gates)
        (torch.Size([2, 10]), ['block1', 'block2'])
    """

    def __init__(
        self,
        depth: int = 38,
        num_classes: int = 10,
        *,
        gate: GateKind = "recurrent",
        decision: Literal["straight_through", "sampled", "hard"] = "straight_through",
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {"depth": depth, "num_classes": num_classes, "gate": gate, "decision": decision, "width": width}
        self.trunk = ResNet(depth, num_classes, width=width)
        self.decision = decision_named(decision)
        channels = [block.outputs for block in self.blocks[:-1]]
        self.gating: RecurrentGates | FeedForwardGates
        if gate == "recurrent":
            self.gating = RecurrentGates(channels, resnet_layout(depth).imagenet)
        elif gate in ("feedforward1", "feedforward2"):
            self.gating = FeedForwardGates(channels, gate)
        else:
            raise ValueError(f"gate must be recurrent, feedforward1 or feedforward2, got {gate!r}")
        self.charges = tuple(Charge(f"trunk.blocks.{index}.residual", (f"block{index}",)) for index in range(1, len(self.blocks)))
        self.overhead = ("gating",)
        self.register_buffer("threshold", torch.tensor(0.5), persistent=False)

    threshold: Tensor

    @property
    def blocks(self) -> list[ResidualBlock]:
        """The residual blocks in order; all but the first are gated."""
        return list(self.trunk.blocks)  # type: ignore[arg-type]

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits (B, K) and one gate of shape (B, 1) per block after the first."""
        check_execution(execution)
        first, *others = self.blocks
        features = first(self.trunk.stem(self.trunk.normalize(images)))
        gates: dict[str, Gate] = {}
        state = None
        for index, block in enumerate(others, start=1):
            score, state = self.gating(features, index - 1, state)
            # Decisions in float32: autocast would round a score across its threshold.
            score, name = score.float(), f"block{index}"
            if execution == "dense":
                executed, features = torch.ones_like(score), block(features)
            else:
                executed = self.decision(name, score, self.threshold, training=self.training)
                features = (run_masked if execution == "masked" else run_skipped)(block, features, executed)
            gates[name] = Gate(score, self.threshold, executed.detach())
        return DynamicOutput(self.trunk.head(global_average(features)), gates)


def run_masked(block: ResidualBlock, features: Tensor, executed: Tensor) -> Tensor:
    """Compute the block for every image and keep it where its gate is open: m B(x) + (1 - m) shortcut(x).

    One fused interpolation; its end points are exact, so a mask of 0 or 1 selects to the last bit.
    """
    shortcut = block.shortcut(features)
    opened = (block.residual(features) + shortcut).relu_()
    return torch.lerp(shortcut, opened, executed.to(opened.dtype)[:, :, None, None])


def run_skipped(block: ResidualBlock, features: Tensor, executed: Tensor) -> Tensor:
    """Compute the block for the images whose gate is open, and only for them: gather, run, scatter."""
    rows = executed.flatten().nonzero().flatten()
    shortcut = block.shortcut(features)
    if len(rows) == 0:
        return shortcut
    if len(rows) == len(features):
        return (block.residual(features) + shortcut).relu_()
    gathered = features[rows]
    # Without a projection the shortcut is the features: one gather serves both.
    carried = gathered if shortcut is features else shortcut[rows]
    opened = (block.residual(gathered) + carried).relu_().to(shortcut.dtype)
    # Nobody reads these features again, so without a gradient the rows are replaced where they lie.
    return shortcut.index_copy(0, rows, opened) if torch.is_grad_enabled() else shortcut.index_copy_(0, rows, opened)
