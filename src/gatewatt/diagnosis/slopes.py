"""Gradients of single scores: where they are exactly zero, and whether that means anything."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from gatewatt.attacks import under_attack, unsaturated
from gatewatt.attacks.losses import gate_margin
from gatewatt.gating import DynamicNetwork, gate_table

PROBED_UNITS = 16
"""Of how many units gradients are taken, one by one; evenly over those that are closed for any image."""


class Slopes:
    """Gradients of scores and of their logits with respect to the image, for a sample of units.

    Args:
        network: the network.
        images: (b, 3, H, W).
        nearby: perturbations of them, each (b, 3, H, W), to see which scores move.

    Attributes:
        closed: which of the sampled gates are closed, bool (b, u).
        score: whether the score's gradient differs from 0 in any pixel, bool (b, u).
        logit: the same for its logit, with the slopes that float32 rounds away in sigmoid and softmax.
        moved: whether any of the nearby images has another score, bool (b, u).
        finite: whether all gradients are.
    """

    def __init__(self, network: DynamicNetwork, images: Tensor, nearby: Sequence[Tensor]) -> None:
        self.finite = True
        with under_attack(network):
            table = gate_table(network(images, "masked").gates)
            closed = table.score < table.threshold
            candidates = closed.any(0).nonzero().flatten()
            chosen = torch.linspace(0, len(candidates) - 1, min(PROBED_UNITS, len(candidates))).round().long()
            units = candidates[chosen.to(candidates.device)]
            self.closed = closed[:, units]
            self.score, self.logit = (self._alive(network, images, units, logit=logit) for logit in (False, True))
            self.moved = torch.zeros_like(self.closed)
            for perturbed in nearby:
                self.moved |= (gate_table(network(perturbed, "masked").gates).score != table.score)[:, units]

    def _alive(self, network: DynamicNetwork, images: Tensor, units: Tensor, *, logit: bool) -> Tensor:
        at = images.detach().clone().requires_grad_()
        with unsaturated() if logit else nullcontext():
            table = gate_table(network(at, "masked").gates)
        values = gate_margin(table) if logit else table.score
        alive = torch.zeros_like(self.closed)
        if not values.requires_grad:
            return alive
        for place, unit in enumerate(units.tolist()):
            (gradient,) = torch.autograd.grad(values[:, unit].sum(), at, retain_graph=True, allow_unused=True)
            if gradient is not None:
                self.finite &= bool(torch.isfinite(gradient).all())
                alive[:, place] = gradient.flatten(1).ne(0).any(1)
        return alive
