"""Networks small enough to be worked out by hand, and gates without a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gatewatt.attacks import Attack, AttackResult
from gatewatt.flops import FlopsLedger
from gatewatt.gating import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, decision_named


def gate(executed: Sequence[Sequence[float]], score: Tensor | None = None) -> Gate:
    """A gate that executed what is given; its scores agree unless given themselves."""
    ran = torch.tensor(executed)
    return Gate(0.2 + 0.6 * ran if score is None else score, torch.tensor(0.5), ran)


class Logistic(DynamicNetwork):
    """Gates logistic in the pixels, G = sigmoid(W x + b): every gradient can be written down.

    Gate ``a`` has three units, gate ``b`` two; two linear modules are charged to them. Images are (3, 2, 2).
    """

    def __init__(self, decision: str = "straight_through") -> None:
        super().__init__()
        self.arguments = {"decision": decision, "num_classes": 4}
        self.decision = decision_named(decision)
        generator = torch.Generator().manual_seed(5)
        self.weight = nn.Parameter(torch.randn(5, 12, generator=generator))
        self.bias = nn.Parameter(torch.tensor([-0.6, 0.4, 0.0, 0.7, -0.3]))
        self.a, self.b, self.head = nn.Linear(12, 9, bias=False), nn.Linear(12, 2, bias=False), nn.Linear(12, 4)
        self.charges = (Charge("a", ("a",)), Charge("b", ("b",)))

    def logits(self, pixels: Tensor) -> Tensor:
        """Of all gates, (B, 5); around the middle grey, so that an untrained gate can be on either side of its threshold.

        Product by product, since a matrix product rounds an image differently alone and in a batch.
        """
        return ((pixels - 0.5)[:, None] * self.weight).sum(2) + self.bias

    def scores(self, pixels: Tensor) -> Tensor:
        """Of all gates, (B, 5)."""
        return torch.sigmoid(self.logits(pixels))

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits that depend on how many units of each gate ran."""
        pixels = images.flatten(1)
        logits, gates = self.head(pixels), {}
        for name, score in zip(("a", "b"), self.scores(pixels).split([3, 2], dim=1), strict=True):
            threshold = torch.full((), 0.5, dtype=score.dtype)
            executed = torch.ones_like(score) if execution == "dense" else self.decision(name, score, threshold, training=self.training)
            gates[name] = Gate(score, threshold, executed.detach())
            logits = logits + executed.mean(1, keepdim=True) * self.get_submodule(name)(pixels).sum(1, keepdim=True)
        return DynamicOutput(logits, gates)


LEDGER = FlopsLedger(
    prices={"a": 108.0, "b": 24.0},
    charges=(Charge("a", ("a",)), Charge("b", ("b",))),
    dense=180.0,
    fixed=48.0,
    overhead=0.0,
    resolution=(2, 2),
    units={"a": 3, "b": 2},
)
"""Prices of :class:`Logistic`, worked out by hand."""


class Saturated(Logistic):
    """The same decisions from logits a thousand times as large: scores of 0 or 1, to the last bit of float32, and no slope."""

    def scores(self, pixels: Tensor) -> Tensor:
        return torch.sigmoid(1000 * self.logits(pixels))


class Detached(Logistic):
    """The same scores without a path of gradients to the image."""

    def scores(self, pixels: Tensor) -> Tensor:
        return super().scores(pixels.detach())


class Blocks(DynamicNetwork):
    """``x + block(x)`` for every module given, each behind a gate of one unit; the modules keep the shape (B, 3, H, W)."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.arguments = {"num_classes": 10}
        self.decision = decision_named("straight_through")
        self.blocks, self.scores, self.head = nn.ModuleList(blocks), nn.Linear(3, len(blocks)), nn.Linear(3, 10)
        self.charges = tuple(Charge(f"blocks.{index}", (f"block{index}",)) for index in range(len(blocks)))
        self.overhead = ("scores",)

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """All scores first, then block by block."""
        features, scores = images, torch.sigmoid(self.scores(images.mean((2, 3))))
        gates, threshold = {}, torch.tensor(0.5)
        for index, block in enumerate(self.blocks):
            name, score = f"block{index}", scores[:, index : index + 1]
            executed = torch.ones_like(score) if execution == "dense" else self.decision(name, score, threshold, training=self.training)
            gates[name] = Gate(score, threshold, executed.detach())
            if execution == "skipped":
                rows = executed.flatten().nonzero().flatten()
                features = features.index_add(0, rows, block(features[rows])) if len(rows) else features
            else:
                features = features + executed[:, :, None, None] * block(features)
        return DynamicOutput(self.head(features.mean((2, 3))), gates)


class Levels(Blocks):
    """Opens its one gate for an image that is not made of 8-bit levels, and closes it for one that is."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 3, padding=1))
        nn.init.constant_(self.scores.weight, 1000.0)
        nn.init.constant_(self.scores.bias, -5.0)

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Look at nothing but the distance from the levels."""
        return super().forward((255 * images - (255 * images).round()).abs(), execution)


class Rooted(Blocks):
    """Finite everywhere, with an infinite slope at black."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 3, 1))
        nn.init.constant_(self.scores.weight, -0.01)
        nn.init.constant_(self.scores.bias, -0.1)

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Of the square root."""
        return super().forward(images.sqrt(), execution)


class Nudge(Attack):
    """Adds less than half a level, which rounding takes away again."""

    @property
    def settings(self) -> dict[str, Any]:
        """Its name."""
        return {"name": self.name}

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Perturb, whatever the network."""
        return AttackResult((images + 0.4 / 255).clamp(max=1), torch.ones(len(images), dtype=torch.int64))


class Attention(nn.Module):
    """One head of fused attention over the positions of (B, 3, H, W): keys of width 5, values of width 3."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(3, 5), nn.Linear(3, 5), nn.Linear(3, 3)

    def forward(self, features: Tensor) -> Tensor:
        """Attend over positions."""
        tokens = features.flatten(2).transpose(1, 2)[:, None]
        attended = scaled_dot_product_attention(self.query(tokens), self.key(tokens), self.value(tokens))
        return attended[:, 0].transpose(1, 2).reshape(features.shape)


class Ungated(DynamicNetwork):
    """A static network in the clothes of a dynamic one."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments, self.decision = {"num_classes": 2}, decision_named("hard")
        self.head = nn.Linear(3, 2)

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits and no gate."""
        return DynamicOutput(self.head(images.mean((2, 3))), {})
