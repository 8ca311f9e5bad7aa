"""ManiDP: for each image, every convolution computes only the channels whose saliency reaches the layer's threshold.

Tang et al., "Manifold Regularized Dynamic Network Pruning" (CVPR 2021). Two mask blocks per residual block of a ResNet predict a saliency
pi >= 0 for each output channel of its two 3x3 convolutions. Channels with pi >= xi are kept and multiplied by pi (which carries the gradient),
the others are left out; xi, one number per mask block, is calibrated during training (:mod:`gatewatt.callbacks.saliency`).

Always computed: stem, shortcuts, head, and the mask blocks. Where the original leaves a defect, it is mended here: a channel with pi = 0
contributes nothing and counts as left out, also where xi = 0 (section 5.5 of the specification).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gatewatt.gating import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, check_execution, decision_named
from gatewatt.networks.layers import IMAGENET_MEAN, IMAGENET_STD, Normalize, global_average
from gatewatt.networks.resnet import conv, resnet_layout

# The originals' own CIFAR statistics, (125.3, 123.0, 113.9) / 255 and (63.0, 62.1, 66.7) / 255.
MEAN, STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
LIMIT = 1000.0  # the saliency is cut off here
UNCALIBRATED = -10000.0  # the first xi: every response is above it, so every channel is kept


def keep_score(response: Tensor, xi: Tensor, spread: Tensor) -> Tensor:
    """Score of channels: G = sigmoid((y - xi) / s), at least 0.5 exactly where the channel is kept (section 1.1 of the specification).

    Taken from the response y before the ReLU, since a dead saliency pi = max(y, 0) has no gradient to open its channel with. A channel is kept
    if y >= xi and, for a calibrated threshold xi >= 0, if it is alive, y > 0; that is pi >= xi > 0 or pi > 0 = xi.

    Args:
        response: y of every channel, (B, C).
        xi: threshold of the layer, one number; below 0 before it is calibrated.
        spread: scale s > 0 of the layer's responses, one number; it decides nothing.

    Returns:
        Scores (B, C) in [0, 1].

    Example:
        >>> keep_score(torch.tensor([[1.5, 2.0, -2.0]]), torch.tensor(2.0), torch.tensor(1.0)).ge(0.5).tolist()
        [[False, True, False]]
    """
    score = torch.sigmoid((response - xi) / spread)
    kept = torch.logical_and(response >= xi, torch.logical_or(response > 0, xi < 0))
    # The largest number below 0.5: a response just below xi must not be rounded up to it.
    below = 0.5 - torch.finfo(score.dtype).eps / 4
    exact = torch.where(kept, score.clamp(min=0.5), score.clamp(max=below))
    return score + (exact - score).detach()


class MaskBlock(nn.Module):
    """Predicts a response y for every output channel of a convolution; the saliency is its positive part.

    Linear, ReLU, linear, on pooled features; the hidden layer is as wide as the output, from 80 channels on half as wide.

    Args:
        inputs: channels of the pooled features.
        outputs: channels of the convolution.

    Attributes:
        xi: threshold of the saliency; part of the checkpoint, written by the calibration alone.
        spread: standard deviation of the responses, scale of the gate score; likewise.
    """

    xi: Tensor
    spread: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        hidden = outputs if outputs < 80 else outputs // 2
        self.reduce, self.expand = nn.Linear(inputs, hidden, bias=False), nn.Linear(hidden, outputs)
        for layer in (self.reduce, self.expand):
            nn.init.kaiming_normal_(layer.weight)
        nn.init.ones_(self.expand.bias)
        self.register_buffer("xi", torch.tensor(UNCALIBRATED))
        # On the scale of the first xi, so that scores have a gradient before they are calibrated, too.
        self.register_buffer("spread", torch.tensor(-UNCALIBRATED))

    def forward(self, pooled: Tensor) -> Tensor:
        """Responses y (B, C) of pooled features, float32 or better."""
        response = self.expand(self.reduce(pooled).relu())
        # Decisions in float32: autocast would round a response across its threshold.
        return response if response.dtype == torch.float64 else response.float()


class LiveConv(nn.Module):
    """A 3x3 convolution and its BatchNorm, of which only the live channels need to be computed.

    Args:
        inputs: channels in.
        outputs: channels out.
        stride: spatial stride.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.inputs, self.outputs, self.stride = inputs, outputs, stride
        self.layers = nn.Sequential(conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor, kept: Tensor | None = None, given: Tensor | None = None) -> Tensor:
        """Convolve and normalise.

        Args:
            features: (B, C, H, W), all channels in, or the live ones alone.
            kept: indices of the channels out to compute; None for the whole convolution in one piece.
            given: indices of the channels in that ``features`` holds; None for all.

        Returns:
            (B, len(kept), H', W'), normalised with the running statistics if ``kept`` is given.
        """
        if kept is None:
            return self.layers(features)
        convolution, norm = self.layers
        assert isinstance(convolution, nn.Conv2d)
        # An attack folds BatchNorm into the convolution (gatewatt.attacks.base.folded), which then has a bias.
        bias = None if convolution.bias is None else convolution.bias[kept]
        if features.shape[1] == 0:
            # Nothing comes in, and what BatchNorm makes of nothing is its shift.
            height, width = (-(-side // self.stride) for side in features.shape[2:])
            convolved = features.new_zeros((len(features), len(kept), height, width))
            if bias is not None:
                convolved = convolved + bias[:, None, None]
        else:
            weight = convolution.weight[kept] if given is None else convolution.weight[kept][:, given]
            convolved = functional.conv2d(features, weight, bias, stride=self.stride, padding=1)
        if not isinstance(norm, nn.BatchNorm2d):
            return convolved
        assert norm.running_mean is not None
        assert norm.running_var is not None
        statistics = norm.running_mean[kept], norm.running_var[kept]
        return functional.batch_norm(convolved, *statistics, norm.weight[kept], norm.bias[kept], eps=norm.eps)

    def extent(self, features: Tensor, kept: Tensor | None = None, given: Tensor | None = None) -> tuple[int, int]:
        """Pairs of channels (in, out) convolved over all images, and those of one whole image (:class:`~gatewatt.gating.PartlyRun`)."""
        outputs = self.outputs if kept is None else len(kept)
        return len(features) * features.shape[1] * outputs, self.inputs * self.outputs


class MaskedBlock(nn.Module):
    """A basic residual block with a mask block for each of its convolutions.

    Args:
        inputs: channels in.
        outputs: channels of both convolutions.
        stride: spatial stride of the block.
        normalized: BatchNorm behind the projection shortcut (ImageNet; the CIFAR networks have none there).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, normalized: bool) -> None:
        super().__init__()
        self.conv_a, self.conv_b = LiveConv(inputs, outputs, stride), LiveConv(outputs, outputs)
        self.mask1, self.mask2 = MaskBlock(inputs, outputs), MaskBlock(outputs, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = conv(inputs, outputs, 1, stride)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs)) if normalized else projection


class Masking:
    """What the mask blocks of one forward pass decide, gathered for its output.

    Args:
        network: whose decision and mode apply.
        execution: of the pass; ``dense`` keeps every channel.

    Attributes:
        gates: gate name -> its decisions so far.
        aux: ``response/<gate>`` y and ``saliency/<gate>`` pi, (B, C) each; ``features/<gate>`` what :meth:`saw` was told.
    """

    def __init__(self, network: ManiDP, execution: Execution) -> None:
        self.network, self.dense = network, execution == "dense"
        self.gates: dict[str, Gate] = {}
        self.aux: dict[str, Tensor] = {}

    def __call__(self, name: str, block: MaskBlock, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Decide on the channels of gate ``name``; returns factors (the saliency where kept, else 0) and decisions, (B, C) each."""
        response = block(pooled)
        score, network = keep_score(response, block.xi, block.spread), self.network
        executed = torch.ones_like(score) if self.dense else network.decision(name, score, network.threshold, training=network.training)
        saliency = response.relu().clamp(max=LIMIT)
        self.gates[name] = Gate(score, network.threshold, executed.detach())
        self.aux[f"response/{name}"], self.aux[f"saliency/{name}"] = response, saliency
        return saliency * executed, executed

    def saw(self, name: str, pooled: Tensor) -> Tensor:
        """Note the pooled features (B, C) behind the convolution of gate ``name``, before its mask; returns them."""
        self.aux[f"features/{name}"] = pooled
        return pooled


class ManiDP(DynamicNetwork):
    """A residual network with a gate for every channel of its 3x3 convolutions, the stem's left out.

    Gates are ``block<i>.mask1`` (channels of the first convolution) and ``block<i>.mask2`` (of the second), one unit per channel; the second
    convolution costs live channels in times live channels out. A network that was never calibrated keeps every channel.

    In ``dense`` execution it is the static parent, without masks and saliencies: train it so first, then go on masked from that checkpoint with
    :class:`~gatewatt.callbacks.saliency.SaliencyCalibration`. In ``skipped`` execution BatchNorm always uses its running statistics.

    Entries of ``aux``, (B, C) each: ``response/<gate>`` (y), ``saliency/<gate>`` (pi), and in masked execution ``features/<gate>``, the pooled
    output of the convolution before the mask (after the ReLU, respectively after BatchNorm).

    Args:
        depth: 6n + 2 for CIFAR (20, 32, 56), or 18, 34 for ImageNet.
        num_classes: classes K.
        width: channels of the first group; the default is the original's (16 for CIFAR, 64 for ImageNet).
        neutral_masks: start with all saliencies at 1, so that the second stage begins as the trained parent. The original's random mask blocks
            rescale every channel at random, and each by features that the ones before have rescaled: a short second stage does not recover.

    Raises:
        ValueError: for a depth that does not exist or has bottlenecks, or a width or a number of classes out of range.

    Example:
        >>> output = ManiDP(depth=8, num_classes=10, width=4)(torch.rand(2, 3, 32, 32))
        >>> output.logits.shape, {name: gate.score.shape[1] for name, gate in output.gates.items() if name.startswith("block2")}
        (torch.Size([2, 10]), {'block2.mask1': 16, 'block2.mask2': 16})
    """

    threshold: Tensor

    def __init__(self, depth: int = 20, num_classes: int = 10, *, width: int | None = None, neutral_masks: bool = False) -> None:
        super().__init__()
        self.arguments = {"depth": depth, "num_classes": num_classes, "width": width, "neutral_masks": neutral_masks}
        layout = resnet_layout(depth)
        if layout.bottleneck:
            raise ValueError(f"ManiDP masks basic blocks: depth must be 6n + 2 (CIFAR: 20, 32, 56, ...), 18 or 34, got {depth}")
        width = layout.width if width is None else width
        if width < 1 or num_classes < 2:
            raise ValueError(f"width must be at least 1 and num_classes at least 2, got {width} and {num_classes}")
        first: list[nn.Module]
        if layout.imagenet:
            self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
            first = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
        else:
            self.normalize = Normalize(MEAN, STD)
            first = [conv(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*first)
        self.blocks = nn.ModuleList()
        channels = width
        for group, count in enumerate(layout.blocks):
            for position in range(count):
                stride = 2 if group > 0 and position == 0 else 1
                self.blocks.append(MaskedBlock(channels, width << group, stride, layout.imagenet))
                channels = width << group
        self.head = nn.Linear(channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if neutral_masks:
            for module in self.modules():
                if isinstance(module, MaskBlock):
                    nn.init.zeros_(module.expand.weight)  # the bias is 1
        self.decision = decision_named("hard")
        self.charges = tuple(
            charge
            for index in range(len(self.blocks))
            for charge in (
                Charge(f"blocks.{index}.conv_a", (f"block{index}.mask1",)),
                Charge(f"blocks.{index}.conv_b", (f"block{index}.mask1", f"block{index}.mask2")),
            )
        )
        self.overhead = tuple(f"blocks.{index}.{mask}" for index in range(len(self.blocks)) for mask in ("mask1", "mask2"))
        self.register_buffer("threshold", torch.tensor(0.5), persistent=False)

    @property
    def masks(self) -> dict[str, MaskBlock]:
        """Gate name -> the mask block that decides it, in execution order."""
        return {f"block{index}.{name}": getattr(block, name) for index, block in enumerate(self.blocks) for name in ("mask1", "mask2")}

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits (B, K) and two gates per block, of shape (B, C) for C channels."""
        check_execution(execution)
        run = {"masked": run_masked, "dense": run_dense, "skipped": run_skipped}[execution]
        masking, features = Masking(self, execution), self.stem(self.normalize(images))
        for index, block in enumerate(self.blocks):
            assert isinstance(block, MaskedBlock)
            features = run(block, f"block{index}", features, masking)
        return DynamicOutput(self.head(global_average(features)), masking.gates, aux=masking.aux)


def over_positions(factors: Tensor, features: Tensor) -> Tensor:
    """Multiply features (B, C, H, W) by one factor (B, C) per channel."""
    return features * factors.to(features.dtype)[:, :, None, None]


def run_masked(block: MaskedBlock, name: str, features: Tensor, masking: Masking) -> Tensor:
    """Compute every channel and multiply it by its saliency, or by 0 where it is left out."""
    first, _ = masking(f"{name}.mask1", block.mask1, global_average(features))
    hidden = block.conv_a(features).relu_()
    # The mean of the masked features is the masked mean: one pass over the positions serves the objective and the second mask.
    pooled = masking.saw(f"{name}.mask1", global_average(hidden))
    second, _ = masking(f"{name}.mask2", block.mask2, first * pooled)
    residual = block.conv_b(over_positions(first, hidden))
    masking.saw(f"{name}.mask2", global_average(residual))
    return (over_positions(second, residual) + block.shortcut(features)).relu_()


def run_dense(block: MaskedBlock, name: str, features: Tensor, masking: Masking) -> Tensor:
    """The static block. The mask blocks run beside it, because they are part of what the network costs."""
    masking(f"{name}.mask1", block.mask1, global_average(features))
    hidden = block.conv_a(features).relu_()
    masking(f"{name}.mask2", block.mask2, global_average(hidden))
    return (block.conv_b(hidden) + block.shortcut(features)).relu_()


def run_skipped(block: MaskedBlock, name: str, features: Tensor, masking: Masking) -> Tensor:
    """Compute the live channels, and only them: images that keep the same ones together, with the weights of those channels."""
    first, executed = masking(f"{name}.mask1", block.mask1, global_average(features))
    shortcut = block.shortcut(features)
    pooled = torch.zeros_like(first)
    groups: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows, live in alike(executed):
        gathered = features if len(rows) == len(features) else features[rows]
        hidden = block.conv_a(gathered, live).relu_() if len(live) else gathered.new_zeros((len(rows), 0, *shortcut.shape[2:]))
        factors = first[rows][:, live]
        pooled[rows[:, None], live] = factors * global_average(hidden)
        groups.append((rows, live, over_positions(factors, hidden)))
    second, executed = masking(f"{name}.mask2", block.mask2, pooled)
    residual = torch.zeros_like(shortcut)
    for rows, given, hidden in groups:
        for part, kept in alike(executed[rows]):
            if len(kept):
                chosen = rows[part]
                computed = block.conv_b(hidden[part], kept, given)
                residual[chosen[:, None], kept] = over_positions(second[chosen][:, kept], computed).to(residual.dtype)
    return (residual + shortcut).relu_()


def alike(executed: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Group images by the channels they keep.

    Args:
        executed: 0 or 1, (B, C).

    Returns:
        For each pattern that occurs, the rows that have it, rising, and the channels it keeps, rising.

    Example:
        >>> [(rows.tolist(), kept.tolist()) for rows, kept in alike(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))]
        [([0, 2], [0]), ([1], [])]
    """
    rows: dict[tuple[bool, ...], list[int]] = {}
    for row, pattern in enumerate(executed.bool().tolist()):
        rows.setdefault(tuple(pattern), []).append(row)
    device = executed.device
    return [(torch.tensor(each, device=device), executed[each[0]].nonzero().flatten()) for each in rows.values()]
