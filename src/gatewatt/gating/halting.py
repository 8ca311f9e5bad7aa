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


def go_on_score(cumulative: Tensor, eps: float = 0.01) -> Tensor:
    """G = r / (r + c), r = 1 - eps: at least 0.5 iff the unit goes on (c <= r). Same shape; its gradient is nowhere exactly zero."""
    rest = 1 - eps
    return rest / (rest + cumulative)


def accumulate(state: HaltingState, halting: Tensor, *, frozen: bool = False) -> Tensor:
    """Sum of halting scores after a layer.

    Args:
        state: before the layer.
        halting: h in [0, 1], (B, U).
        frozen: leave stopped units where they stopped. Otherwise their sums grow on, for networks whose stopped units still give meaningful
            scores; decisions do not depend on it, since a sum never falls.
    """
    return state.cumulative + (halting * state.running if frozen else halting)


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
