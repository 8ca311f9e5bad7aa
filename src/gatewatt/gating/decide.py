"""From a score to a decision: hard, straight-through, sampled, forced.

A decision is a small callable that a network holds as ``network.decision``. It returns 0 or 1 per unit, with or without a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gatewatt.gating.gate import DynamicNetwork


class Decision(Protocol):
    """Turns scores into executed units."""

    def __call__(self, name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
        """Return 0 or 1 per unit, in the dtype and shape (B, U) of ``score``."""
        ...


def hard(name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
    """``1[score >= threshold]`` without a gradient (Eq. 1; HRL at test time).

    Example:
        >>> hard("gate", torch.tensor([[0.5, 0.4]]), torch.tensor(0.5), training=False).tolist()
        [[1.0, 0.0]]
    """
    return (score >= threshold).to(score.dtype)


def straight_through(name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
    """The value of :func:`hard` with the gradient of ``score`` (SkipNet SP, in training and at test time)."""
    decision = hard(name, score.detach(), threshold, training=training)
    # (score - score.detach()) is exactly zero, so the value stays exactly 0 or 1; score + (decision - score) would round.
    return decision + (score - score.detach())


def sampled(name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
    """A Bernoulli(score) draw in training, :func:`hard` otherwise (SkipNet HRL)."""
    return torch.bernoulli(score.detach()) if training else hard(name, score, threshold, training=False)


class Forced:
    """Decisions dictated from outside, for audits of arbitrary gate patterns.

    Args:
        pattern: gate name -> 0/1 decisions of shape (B, U). Every gate of the network must be named.
    """

    def __init__(self, pattern: Mapping[str, Tensor]) -> None:
        self.pattern = pattern

    def __call__(self, name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
        """The decisions dictated for the gate ``name``."""
        if name not in self.pattern:
            raise ValueError(f"no forced decision for gate {name!r}; the pattern names {', '.join(self.pattern)}")
        decision = self.pattern[name].to(score)
        if decision.shape != score.shape:
            raise ValueError(f"forced decision of gate {name!r} has shape {tuple(decision.shape)}, the gate {tuple(score.shape)}")
        return decision


@contextmanager
def forced(network: DynamicNetwork, pattern: Mapping[str, Tensor]) -> Iterator[None]:
    """Dictate every gate of ``network`` within the block, then give it back its own decision."""
    own = network.decision
    network.decision = Forced(pattern)
    try:
        yield
    finally:
        network.decision = own


DECISIONS: dict[str, Decision] = {"hard": hard, "straight_through": straight_through, "sampled": sampled}


def decision_named(name: str) -> Decision:
    """Look up a decision by the name that recipes use."""
    if name not in DECISIONS:
        raise ValueError(f"decision must be one of {', '.join(DECISIONS)}, got {name!r}")
    return DECISIONS[name]
