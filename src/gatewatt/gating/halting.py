"""Adaptive computation time: units of an image (positions, tokens, or the image) that stop at different layers and average what they saw.

Graves 2016; per position in SACT (Figurnov et al., CVPR 2017), per token in A-ViT (Yin et al., CVPR 2022). A unit adds up halting scores
h_1, h_2, ... and stops after layer N, the first with h_1 + ... + h_N > 1 - eps. Its output is the sum of its states weighted with h_l for
l < N and with the remainder R = 1 - (h_1 + ... + h_{N-1}) for l = N; its ponder cost is N + R. (The papers also stop at equality; here a
score on its threshold spends, as everywhere.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class HaltingState(NamedTuple):
    """Where every unit stands before a layer; all of shape (B, U).

    Attributes:
        running: 0 or 1, whether the layer runs for the unit; a constant for autograd.
        cumulative: sum of halting scores so far.
        ponder: N + R as far as known: layers run, plus the remainder of units that stopped. Its gradient by h_l is -1 for l < N and 0 for N.
    """

    running: Tensor
    cumulative: Tensor
    ponder: Tensor


def start_halting(like: Tensor) -> HaltingState:
    """Every unit runs; ``like`` (B, U) gives shape, dtype and device."""
    return HaltingState(torch.ones_like(like), torch.zeros_like(like), torch.zeros_like(like))


def go_on_score(state: HaltingState, logits: Tensor, last: Tensor, eps: float = 0.01) -> Tensor:
    """Score of a unit's next layer: G = d / (d + eps + c) with d = 1 - h, at least 0.5 iff the sum c + h stays at most 1 - eps.

    The native test is a comparison of two numbers that are not negative, 1 - h >= eps + c, which needs no temperature to become one with 0.5. d is
    computed from the logits: of a unit that halts firmly, h is 1 to within float32's rounding and r / (r + c + h), r = 1 - eps, is flat and near its
    threshold, so that an attack sees nothing; d is small there and exact, and the logarithm of the score falls with slope 1. A unit that had stopped
    keeps its last score.

    Args:
        state: before the layer.
        logits: of the layer's halting scores h = sigmoid(logits), (B, U) or broadcastable.
        last: the scores of the layer before, (B, U); ones before there are any.
        eps: what may be missing from a sum of 1 to halt.

    Example:
        >>> state = start_halting(torch.zeros(1, 3))
        >>> score = go_on_score(state, torch.tensor([[0.0, 4.0, 9.0]]), torch.ones(1, 3))
        >>> [round(value, 4) for value in score[0].tolist()]
        [0.9804, 0.6427, 0.0122]
    """
    doubt = torch.sigmoid(-logits)
    return torch.where(state.running > 0, doubt / (doubt + eps + state.cumulative), last)


def accumulate(state: HaltingState, halting: Tensor) -> Tensor:
    """Sum of halting scores h in [0, 1], (B, U), after a layer; of a unit that had stopped, as it stood then."""
    return state.cumulative + halting * state.running


def advance(state: HaltingState, halting: Tensor, cumulative: Tensor, go_on: Tensor) -> tuple[Tensor, HaltingState]:
    """Weigh a layer's output and move on to the next.

    Args:
        state: before the layer.
        halting: h of the layer in [0, 1], (B, U).
        cumulative: from :func:`accumulate`.
        go_on: 0 or 1, the decision on the next layer; zeros after the last one. It need not be the scores' own (a forced pattern), and it
            cannot wake a stopped unit.

    Returns:
        The weight (B, U) of the layer's states in the average, 0 for units that did not run, and the state before the next layer. A unit's
        weights add up to 1.
    """
    going, remainder = state.running * go_on.detach(), 1 - state.cumulative
    stopping = state.running - going
    weight = going * halting + stopping * remainder
    return weight, HaltingState(going, cumulative, state.ponder + state.running + stopping * remainder)
