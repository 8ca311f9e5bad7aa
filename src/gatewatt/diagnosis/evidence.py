"""What the checks look at: a network's passes over clean and attacked images, each made once, when the first check asks for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gatewatt.attacks import Attack, Ball, BrokenGradientError, L2Ball, LinfBall, NoGradientError, Noise, ProjectedAttack, SquareSearch
from gatewatt.attacks.spaces import image_norm
from gatewatt.diagnosis.check import DRAWS, Estimate
from gatewatt.diagnosis.slopes import Slopes
from gatewatt.flops import FlopsLedger, measuring, price
from gatewatt.gating import DynamicNetwork, DynamicOutput, Gate, check_images, check_labels, gate_table, measuring_execution
from gatewatt.metrics import round_to_8bit
from gatewatt.metrics.estimates import Column, as_numpy, below_full, bootstrap_sums, percentile_interval, ratio_percent

Norm = Literal["linf", "l2"]
RADII: dict[Norm, float] = {"linf": 8 / 255, "l2": 1.0}
"""Radius of each norm's ball, unless one is given."""
NOISES: tuple[Literal["uniform", "gaussian", "shift", "flat"], ...] = ("uniform", "gaussian", "shift", "flat")
LONGER = 5
"""How many times as many steps the longer attack has."""
ROUNDING = 1e-6
"""By how much float32 may leave a ball, as a share of 1."""
PROBED_IMAGES = 16
"""Of how many images gradients are taken gate by gate."""


@dataclass(frozen=True)
class Settings:
    """How hard an examination tries.

    Attributes:
        norm: ``linf`` or ``l2``, of the ball.
        eps: its radius on the [0, 1] scale; None for 8/255 (``linf``) or 1 (``l2``).
        steps: of the attack with gradients; the longest has five times as many.
        batch_size: images attacked side by side.
        seed: of noise and random search.

    Raises:
        ValueError: for an unknown norm or a number below 1.

    Example:
        >>> Settings("l2").radius
        1.0
    """

    norm: Norm = "linf"
    eps: float | None = None
    steps: int = 50
    batch_size: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if self.norm not in RADII:
            raise ValueError(f"norm must be one of {', '.join(RADII)}, got {self.norm!r}")
        for argument, value in (("steps", self.steps), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{argument} must be at least 1, got {value}")

    @property
    def radius(self) -> float:
        """The radius given, or the norm's own."""
        return RADII[self.norm] if self.eps is None else self.eps


class Passes(NamedTuple):
    """What the network did with n images: FLOPs (n,), executed units bool (n, N), predicted classes (n,)."""

    flops: Column
    executed: np.ndarray
    prediction: np.ndarray


class Attacked(NamedTuple):
    """What an attack made of the n images.

    Attributes:
        flops: MACs of each adversarial image, (n,).
        flops_8bit: the same after rounding it to 8 bits.
        prediction: predicted classes, (n,).
        outside: by how much the worst pixel leaves [0, 1]; NaN if one is not finite.
        beyond: by how much the longest perturbation exceeds its radius.
        obstacle: why there was no attack and the images are as they were; None if there was one.
    """

    flops: Column
    flops_8bit: Column
    prediction: np.ndarray
    outside: float
    beyond: float
    obstacle: str | None = None


class Evidence:
    """Passes and attacks of one examination; nothing is run before a check asks for it.

    The attack with gradients is :class:`~gatewatt.attacks.ProjectedAttack` on its default loss, the one without
    :class:`~gatewatt.attacks.SquareSearch` with two queries for each of its steps, as in :class:`~gatewatt.attacks.AutoEnergy`.

    Args:
        network: the network or defense.
        images: (n, 3, H, W) in [0, 1].
        labels: (n,), for the accuracies; None leaves them out.
        settings: how hard to try.
        ledger: prices at the images' resolution; measured on the spot when left out.
        source: a second network, on which the transfer attack is crafted.

    Raises:
        ValueError: for invalid images or labels, fewer than two images, or a radius that is none.

    Attributes:
        opened: gate -> which of its units ran in any pass so far, 0 or 1, (U,).
        highest: most MACs of any pass so far.
        made: every attack so far.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        images: Tensor,
        labels: Tensor | None = None,
        settings: Settings | None = None,
        *,
        ledger: FlopsLedger | None = None,
        source: DynamicNetwork | None = None,
    ) -> None:
        check_images(images)
        if labels is not None:
            check_labels(labels, images)
        if len(images) < 2:
            raise ValueError(f"images must be at least 2, got {len(images)}")
        settings = settings or Settings()
        self.network, self.images, self.labels, self.source = network, images, labels, source
        self.norm, self.eps, self.steps = settings.norm, settings.radius, settings.steps
        self.batch_size, self.seed = settings.batch_size, settings.seed
        if not 0 < self.eps < self.unbounded:
            raise ValueError(f"eps must be above 0 and below {self.unbounded:g}, where it is no bound, got {self.eps:g}")
        self.ledger = ledger or price(network, images[:1])
        self.opened: dict[str, Tensor] = {}
        self.highest = 0.0
        self.made: list[Attacked] = []
        self._white: dict[tuple[float, int], Attacked] = {}

    # Passes

    def run(self, images: Tensor) -> list[DynamicOutput]:
        """Eval passes over ``images``, batch by batch, really skipped where the network can; remembers which gates ever ran."""
        with measuring(self.network):
            outputs = [self.network(part, measuring_execution(self.network)) for part in images.split(self.batch_size)]
        for output in outputs:
            for name, gate in output.gates.items():
                ran = gate.executed.amax(0)
                self.opened[name] = torch.maximum(self.opened[name], ran) if name in self.opened else ran
        return outputs

    def passes(self, images: Tensor) -> Passes:
        """What the network does with ``images``."""
        outputs = self.run(images)
        flops = as_numpy(torch.cat([self.ledger(output.gates) for output in outputs]))
        self.highest = max(self.highest, float(flops.max()))
        executed = torch.cat([gate_table(output.gates).executed for output in outputs]) > 0.5
        return Passes(flops, executed.cpu().numpy(), torch.cat([output.logits.argmax(1) for output in outputs]).cpu().numpy())

    @cached_property
    def clean(self) -> Passes:
        """The clean images."""
        return self.passes(self.images)

    @property
    def saves(self) -> bool:
        """Whether any clean image saves FLOPs; otherwise there is nothing to recover."""
        return bool(below_full(self.clean.flops, self.ledger.dense).any())

    @cached_property
    def gates(self) -> Mapping[str, Gate]:
        """The gates of one image, for their names and units."""
        return self.run(self.images[:1])[0].gates

    def never_opened(self) -> dict[str, int]:
        """Gate -> how many of its units no pass so far has opened, gates without such units left out."""
        closed = {name: int((self.opened[name] < 0.5).sum()) for name, gate in self.gates.items() if gate.follows is None}
        return {name: count for name, count in closed.items() if count}

    def all_ever_opened(self) -> float:
        """MACs of an image that opens every unit that any pass so far has opened."""
        gates = {name: replace(gate, executed=self.opened[name][None]) for name, gate in self.gates.items()}
        return float(self.ledger(gates))

    @cached_property
    def slopes(self) -> Slopes:
        """Gradients of single gates on the first images, and how noise at the radius and at four times the radius moves their scores."""
        images = self.images[:PROBED_IMAGES]
        noises = [Noise("gaussian", space=self.ball(eps), seed=self.seed) for eps in (self.eps, min(4 * self.eps, self.unbounded))]
        return Slopes(self.network, images, [noise(self.network, images, ledger=self.ledger).images for noise in noises])

    # Attacks

    def ball(self, eps: float) -> Ball:
        """The ball of a radius."""
        return LinfBall(eps) if self.norm == "linf" else L2Ball(eps)

    @property
    def unbounded(self) -> float:
        """The radius that reaches every image from every other."""
        return 1.0 if self.norm == "linf" else math.sqrt(self.images[0].numel())

    @property
    def radii(self) -> tuple[float, ...]:
        """Half the radius, the radius, twice and four times as much, as far as they mean something."""
        return tuple(eps for eps in (self.eps / 2, self.eps, 2 * self.eps, 4 * self.eps) if eps < self.unbounded)

    def attacked(self, attack: Attack, eps: float, on: DynamicNetwork | None = None) -> Attacked:
        """Run an attack, crafted on the network itself or ``on`` another one, and measure what it made."""
        ledger = self.ledger if on is None else price(on, self.images[:1])
        obstacle, crafted = None, []
        for rows in torch.arange(len(self.images)).split(self.batch_size):
            images, labels = self.images[rows], None if self.labels is None else self.labels[rows]
            try:
                crafted.append(attack(self.network if on is None else on, images, labels, ledger=ledger).images)
            except (NoGradientError, BrokenGradientError) as error:
                # What an attacker without another attack is left with.
                crafted.append(images)
                obstacle = "no gradient leads to the image" if isinstance(error, NoGradientError) else "a gradient is NaN or infinite"
        adversarial = torch.cat(crafted)
        change = adversarial.double() - self.images.double()
        length = change.abs().amax() if self.norm == "linf" else image_norm(change).amax()
        outside = torch.maximum(-adversarial, adversarial - 1).amax()
        passes, rounded = self.passes(adversarial), self.passes(round_to_8bit(adversarial))
        found = Attacked(passes.flops, rounded.flops, passes.prediction, float(outside), float(length) - eps, obstacle)
        self.made.append(found)
        return found

    def white_box(self, eps: float | None = None, times: int = 1) -> Attacked:
        """The attack with gradients, at the radius unless another is given, with ``times`` as many steps."""
        key = (self.eps if eps is None else eps, times * self.steps)
        if key not in self._white:
            self._white[key] = self.attacked(ProjectedAttack(space=self.ball(key[0]), steps=key[1], seed=self.seed), key[0])
        return self._white[key]

    @cached_property
    def search(self) -> Attacked:
        """The random search."""
        return self.attacked(SquareSearch(space=self.ball(self.eps), steps=2 * self.steps, seed=self.seed), self.eps)

    @cached_property
    def noises(self) -> dict[str, Attacked]:
        """Noise, a shift and a flat image."""
        return {kind: self.attacked(Noise(kind, space=self.ball(self.eps), seed=self.seed), self.eps) for kind in NOISES}

    @cached_property
    def transfer(self) -> Attacked:
        """The attack with gradients, crafted on the source."""
        assert self.source is not None
        return self.attacked(ProjectedAttack(space=self.ball(self.eps), steps=self.steps, seed=self.seed), self.eps, on=self.source)

    # Estimates

    def percent_of_saved(self, change: Column, reachable: float | None = None) -> Estimate:
        """``change`` of FLOPs (n,) in percent of what the clean images save against dense, or against the ``reachable`` FLOPs, ratio of sums."""
        limit = self.ledger.dense if reachable is None else reachable
        return share(change, np.maximum(limit - self.clean.flops, 0.0))

    def recovery(self, flops: Column) -> Estimate:
        """Recovery in percent."""
        return self.percent_of_saved(flops - self.clean.flops)

    def accuracy(self, prediction: np.ndarray) -> float | None:
        """Share of predictions that are right; None without labels."""
        return None if self.labels is None else float((prediction == self.labels.cpu().numpy()).mean())


def share(part: Column, whole: Column) -> Estimate:
    """``100 * sum(part) / sum(whole)`` with its bootstrap interval over images."""
    sums = bootstrap_sums(np.stack([part, whole], axis=1), draws=DRAWS)
    value = ratio_percent(np.array([part.sum()]), np.array([whole.sum()]))[0]
    return Estimate(float(value), *percentile_interval(ratio_percent(sums[:, 0], sums[:, 1])))
