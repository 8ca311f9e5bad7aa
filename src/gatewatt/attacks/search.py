"""A black-box member: random squares, judged by the FLOPs that the network really spends, and by nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gatewatt.attacks.base import Attack, AttackResult, BestIterate, described_part, image_generator
from gatewatt.attacks.spaces import Ball, LinfBall, unit_length
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, measuring_execution


class SquareSearch(Attack):
    """Propose a square of constant colour shift; keep it unless the image spends less than before.

    In the manner of Andriushchenko et al., "Square Attack" (ECCV 2020): vertical stripes at +- eps first, then squares whose area falls from
    ``area`` of the image. It needs no gradient, so it finds what an attack with a broken gradient misses. Proposals that spend the same are
    taken too: on the plateaus of a step function one has to walk.

    Args:
        space: the ball (default L-inf 8/255); in an L2 ball the whole perturbation is scaled to the radius.
        steps: queries per image, beside the image itself.
        area: first share of the image's area, in (0, 1].
        seed: of the proposals, which depend on it and on the image alone.
    """

    def __init__(self, *, space: Ball | None = None, steps: int = 200, area: float = 0.3, seed: int = 0) -> None:
        super().__init__()
        if steps < 1 or not 0 < area <= 1:
            raise ValueError(f"steps must be at least 1 and area in (0, 1], got {steps} and {area}")
        self.space, self.steps, self.area, self.seed = space or LinfBall(), steps, area, seed

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        plain = {key: getattr(self, key) for key in ("steps", "area", "seed", "decision")}
        return {"name": self.name, **plain, "space": described_part(self.space)}

    def __repr__(self) -> str:
        return f"{self.name}(eps={self.space.eps:g}, steps={self.steps})"

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Query by query."""
        stripes, places, colours = self._draw(images)
        best, execution = BestIterate(images), measuring_execution(network)
        with torch.no_grad():
            best.offer(images, ledger(network(images, execution).gates), 0)
            rows, spent = torch.arange(len(images), device=images.device), best.flops.clone()
            delta = torch.zeros_like(images)
            for step in range(1, self.steps + 1):
                # An image that runs everything is done, and the others go on without it.
                left = torch.isin(rows, best.unfinished(ledger))
                rows, spent, delta = rows[left], spent[left], delta[left]
                if len(rows) == 0:
                    break
                if step == 1:
                    proposed = self.space.eps * stripes[rows].expand_as(delta)
                else:
                    proposed = self._square(delta, places[rows, step - 1], colours[rows, step - 1], self._side(images, step))
                if self.space.order == 2:
                    proposed = self.space.eps * unit_length(proposed)
                proposed = self.space.restrict(images[rows], proposed)
                perturbed = self.space.image(images[rows], proposed)
                flops = ledger(network(perturbed, execution).gates)
                taken = flops >= spent
                delta, spent = torch.where(taken[:, None, None, None], proposed, delta), torch.where(taken, flops, spent)
                best.offer(perturbed, flops, step, rows)
        return best.result

    def _draw(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Stripes (B, 3, 1, W), and of every query the place in [0, 1) (B, steps, 2) and the colour (B, steps, 3) of its square; colours are +-1."""
        drawn = []
        for image in images.cpu():
            generator = image_generator(image, self.seed)
            stripes = torch.randint(2, (3, 1, images.shape[3]), generator=generator)
            places, colours = torch.rand(self.steps, 2, generator=generator), torch.randint(2, (self.steps, 3), generator=generator)
            drawn.append((2.0 * stripes - 1, places, 2.0 * colours - 1))
        stripes, places, colours = (torch.stack(part).to(images) for part in zip(*drawn, strict=True))
        return stripes, places, colours

    def _square(self, delta: Tensor, place: Tensor, colour: Tensor, side: int) -> Tensor:
        """``delta`` with one square of each image (B, 3, H, W) painted over."""
        height, width = delta.shape[2:]
        top, left = ((place[:, axis] * (length - side + 1)).floor()[:, None] for axis, length in enumerate((height, width)))
        rows, columns = (torch.arange(length, device=delta.device) for length in (height, width))
        inside_rows, inside_columns = (rows >= top) & (rows < top + side), (columns >= left) & (columns < left + side)
        level: float | Tensor = self.space.eps
        if self.space.order == 2:
            level = delta.abs().amax((1, 2, 3), keepdim=True).clamp_min(self.space.eps / math.sqrt(delta[0].numel()))
        return torch.where(inside_rows[:, None, :, None] & inside_columns[:, None, None, :], level * colour[:, :, None, None], delta)

    def _side(self, images: Tensor, step: int) -> int:
        height, width = images.shape[2:]
        # Halved at the fractions of the budget at which Square Attack halves it, 10,000 queries taken as the whole.
        share = self.area / 2 ** sum(step / self.steps > at for at in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
        return max(1, min(round(math.sqrt(share * height * width)), height, width))
