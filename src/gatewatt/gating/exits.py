"""Early exits as gates: the doubt that an exit leaves decides whether the next stage runs."""

from __future__ import annotations

import torch
from torch import Tensor


def exit_score(logits: Tensor, confidence: float | Tensor) -> Tensor:
    """Score of the stage behind an exit: d / (d + 1 - q) with doubt d = 1 - max softmax, so the image goes on iff its confidence is at most q.

    At q = 0.5 a score of 0.5 is a confidence of 0.5, and no temperature enters (GradMDM compares every gate with tau = 0.5). The doubt is
    the sum of the probabilities of the classes that lost, which stays accurate, in value and gradient, where 1 - max softmax would round
    to zero. Which class won counts as a constant; it can change from one step of an attack to the next.

    Args:
        logits: of the exit, (B, K) with K at least 2.
        confidence: q in (0, 1), a number or a tensor of one element.

    Returns:
        (B, 1) in [0, 1], float32 or better. At least 0.5 means that the next stage runs.

    Example:
        >>> exit_score(torch.tensor([[0.0, 0.0]]), 0.5).item()
        0.5
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    lost = torch.softmax(logits, dim=1).scatter(1, logits.argmax(1, keepdim=True), 0.0)
    doubt = lost.sum(1, keepdim=True)
    return doubt / (doubt + (1 - confidence))
