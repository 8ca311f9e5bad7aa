"""Slopes for saturated gates: the backward pass of sigmoid and softmax where float32 has rounded it away.

A network whose gate logits are multiplied by 1000 decides as before, but its scores are exactly 0 or 1 and their slopes exactly 0: an attack that
follows gradients stands still, and a network that hides looks like one that withstands (Athalye et al., "Obfuscated Gradients Give a False
Sense of Security", ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gatewatt.attacks.losses import SMALLEST


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        score = torch.sigmoid(logits)
        ctx.save_for_backward(score)
        return score

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (score,) = ctx.saved_tensors
        return gradient * (score * (1 - score)).clamp_min(SMALLEST)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, dim: int) -> Tensor:
        score = torch.softmax(logits, dim)
        ctx.save_for_backward(score)
        ctx.dim = dim
        return score

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (score,) = ctx.saved_tensors
        share = gradient * score.clamp_min(SMALLEST)
        return share - score * share.sum(ctx.dim, keepdim=True), None


class unsaturated(TorchFunctionMode):  # noqa: N801 - a context manager, written like one
    """Within the block, no slope of a sigmoid or softmax is below 1e-30: too little for any other loss to notice, and what a loss in logits needs.

    :func:`~gatewatt.attacks.losses.gate_margin` divides by the score, at least 1e-30, so that the product is the slope of the logit. Values, and all
    slopes that float32 can tell from zero, stay as they are.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``; for sigmoid and softmax, their counterparts here."""
        return COUNTERPARTS.get(func, func)(*args, **(kwargs or {}))


def _sigmoid(input: Tensor) -> Tensor:
    return _Sigmoid.apply(input)


def _softmax(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    return _Softmax.apply(input if dtype is None else input.to(dtype), dim)


def _functional_softmax(input: Tensor, dim: int, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    return _softmax(input, dim, dtype)


COUNTERPARTS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    functional.sigmoid: _sigmoid,
    torch.softmax: _softmax,
    Tensor.softmax: _softmax,
    functional.softmax: _functional_softmax,
}
