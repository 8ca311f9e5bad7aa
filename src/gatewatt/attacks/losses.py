"""Gate losses: what an energy attack minimises, per image (Pan et al., "GradMDM", TPAMI 2023, Eqs. 5-8).

Every loss takes the gate table and the weights lambda (Sec. 4.4: the unit's share of the FLOPs that all units can save) and returns one number
per image. The paper leaves the scale of lambda open; here it is multiplied by N, so that the mean weight is 1 and the scale of the losses
does not depend on the number of units. Scores are the raw G of all gates, whatever an earlier exit left unexecuted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.gating import DynamicOutput, GateTable


class OutputLoss(ABC):
    """What an attack minimises: a loss over a network's output, one number per image."""

    @abstractmethod
    def of(self, output: DynamicOutput, table: GateTable, weights: Tensor) -> Tensor:
        """Loss of each image, (B,); lower means more computation.

        Args:
            output: of a masked pass.
            table: its gates side by side, (B, N).
            weights: lambda times N, (N,), mean 1.
        """


class GateLoss(OutputLoss):
    """A loss over gates, one number per image."""

    def of(self, output: DynamicOutput, table: GateTable, weights: Tensor) -> Tensor:
        """The loss of the gates, whatever the logits."""
        return self(table, weights)

    @abstractmethod
    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Loss of each image.

        Args:
            table: scores and thresholds of all units, (B, N).
            weights: lambda times N, (N,), mean 1.

        Returns:
            Loss, shape (B,). Lower means more computation.
        """


class ComplexityLoss(GateLoss):
    """Open what is closed (Eq. 6): ``-sum lambda_i min(G_i, tau)``.

    Args:
        thresholds: one level per unit to raise it to, in place of the gates' own tau (ILFO's preset thresholds); None for tau.

    Example:
        >>> table = GateTable(torch.tensor([[0.2, 0.9]]), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0]]))
        >>> round(ComplexityLoss()(table, torch.ones(2)).item(), 4)
        -0.7
    """

    def __init__(self, thresholds: Sequence[float] | None = None) -> None:
        if thresholds is not None and not all(0 < level <= 1 for level in thresholds):
            raise ValueError(f"thresholds must be in (0, 1], one per unit, got {', '.join(map(str, thresholds))}")
        self.thresholds = None if thresholds is None else tuple(float(level) for level in thresholds)

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Eq. 6 per image, shape (B,)."""
        levels = table.threshold if self.thresholds is None else per_unit(self.thresholds, table, "thresholds")
        return -(weights * torch.minimum(table.score, levels)).sum(1)


class PowerLoss(GateLoss):
    """Open first what is nearly open (Eq. 7): ``-sum lambda_i min(G_i, tau)^alpha``.

    Args:
        alpha: at least 1, one number or one per unit; 1 is Eq. 6. The paper uses 4.

    Raises:
        ValueError: if an ``alpha`` is below 1, where the loss would favour the gates that are furthest from opening.
    """

    def __init__(self, alpha: float | Sequence[float] = 4.0) -> None:
        for power in [alpha] if isinstance(alpha, (int, float)) else alpha:
            if not 1 <= power < math.inf:
                raise ValueError(f"alpha must be finite and at least 1 (Eq. 7), got {power}")
        self.alpha = float(alpha) if isinstance(alpha, (int, float)) else tuple(float(power) for power in alpha)

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Eq. 7 per image, shape (B,)."""
        alpha = self.alpha if isinstance(self.alpha, float) else per_unit(self.alpha, table, "alpha")
        return -(weights * torch.minimum(table.score, table.threshold) ** alpha).sum(1)


class FinishedLoss(GateLoss):
    """Keep open what is open (Eq. 8): ``-sum lambda_i max(G_i, tau)``; linear, as in the paper, whatever the power of Eq. 7."""

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Eq. 8 per image, shape (B,)."""
        return -(weights * torch.maximum(table.score, table.threshold)).sum(1)


class NormLoss(GateLoss):
    """The p-norm in place of the sum of powers: ``-(sum lambda_i min(G_i, tau)^p)^(1/p)``, what GradMDM's release minimises instead of Eq. 7.

    Of the same direction as :class:`PowerLoss` with alpha = p, and of another length: it does not fade as p grows.

    Args:
        p: at least 1; 3.5 in the release.
    """

    def __init__(self, p: float = 3.5) -> None:
        if not 1 <= p < math.inf:
            raise ValueError(f"p must be finite and at least 1, got {p}")
        self.p = float(p)

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Minus the norm of what the closed gates have reached, shape (B,)."""
        return -weighted_norm(torch.minimum(table.score, table.threshold), weights, self.p)


class FinishedNormLoss(GateLoss):
    """The p-norm of what open gates lack: ``(sum lambda_i (1 - max(G_i, tau))^p)^(1/p)``, what GradMDM's release protects instead of Eq. 8.

    With p = 50 only gates that are just open count, with p = 0.35 those that are surely open above all.

    Args:
        p: positive; 50 in the release for a network trained with HRL, 0.35 for one trained with SP.
    """

    def __init__(self, p: float = 0.35) -> None:
        if not 0 < p < math.inf:
            raise ValueError(f"p must be finite and positive, got {p}")
        self.p = float(p)

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """The norm, shape (B,)."""
        return weighted_norm(1 - torch.maximum(table.score, table.threshold), weights, self.p)


class HingeLoss(GateLoss):
    """Open what is closed by its distance in logits: ``sum lambda_i max(z_tau + m - z_i, 0)``, z the logit of the score.

    The power loss multiplies the slope of a score by G^(alpha - 1), and both vanish for a firmly closed gate; in logits they do not. Where a
    score underflows to 0, the slope of the sigmoid itself is gone: :func:`~gatewatt.attacks.saturation.unsaturated` brings it back.

    Args:
        margin: m, how far beyond its threshold a gate is pushed, in logits.
        temperature: T of a smooth hinge ``T softplus((z_tau + m - z_i) / T)``, which goes on pulling at gates that are open; 0 for the hinge itself.
    """

    def __init__(self, margin: float = 0.1, temperature: float = 0.0) -> None:
        if not 0 <= margin < math.inf or not 0 <= temperature < math.inf:
            raise ValueError(f"margin and temperature must be finite and at least 0, got {margin} and {temperature}")
        self.margin, self.temperature = float(margin), float(temperature)

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """The hinge per image, shape (B,)."""
        short = self.margin - gate_margin(table)
        hinge = self.temperature * functional.softplus(short / self.temperature) if self.temperature else torch.relu(short)
        return (weights * hinge).sum(1)


class CheapestGateLoss(GateLoss):
    """Open the closed gates one by one, the nearest first: ``sum lambda_i log(1 + max(z_tau - z_i, 0) / s)``, z the logit of the score.

    Its slope, 1 / (s + distance), is steepest for the gate that is nearest to its threshold, on either side: it opens next, and one that threatens to
    close is brought back first. So the loss comes closer than a hinge to what it stands for, the cost of the closed gates, however far they
    are from opening.

    Args:
        scale: s, the distance in logits within which a gate counts as near.
    """

    def __init__(self, scale: float = 0.01) -> None:
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be finite and positive, a distance in logits, got {scale}")
        self.scale = float(scale)

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Logarithms of the distances, weighed and added, shape (B,)."""
        return (weights * torch.log1p(torch.relu(-gate_margin(table)) / self.scale)).sum(1)


class UniformExitsLoss(OutputLoss):
    """DeepSloth: cross entropy of every exit but the last against the uniform distribution (Hong et al., ICLR 2021).

    Raises:
        ValueError: on use, if the network has no exits.
    """

    def of(self, output: DynamicOutput, table: GateTable, weights: Tensor) -> Tensor:
        """Sum over exits of the mean over classes of -log softmax, shape (B,)."""
        if output.exits is None:
            raise ValueError("DeepSloth attacks early exits, and this network returns none; use target='halting' or an attack on gates")
        early = output.exits[:, :-1]
        # In float32 or better, also under autocast.
        return -(early if early.dtype == torch.float64 else early.float()).log_softmax(2).mean(2).sum(1)


class UniformHaltingLoss(GateLoss):
    """DeepSloth's idea where there are no exits: cross entropy of every decision, to go on or to halt, against the uniform distribution.

    A substitute of this package, not a published loss: DeepSloth is undefined without classifiers at the exits. A gate counts as an exit with two
    classes, of probability sigmoid(m) and sigmoid(-m) at a distance of m logits beyond its threshold, so the minimum is on the threshold,
    where a gate runs. Gates count alike, as exits do.
    """

    def __call__(self, table: GateTable, weights: Tensor) -> Tensor:
        """Sum over gates of ``(softplus(m) + softplus(-m)) / 2``, shape (B,)."""
        margin = gate_margin(table)
        return (functional.softplus(margin) + functional.softplus(-margin)).sum(1) / 2


SMALLEST = 1e-30
"""Scores below it count as it: about -69 in logits."""


def gate_margin(table: GateTable) -> Tensor:
    """Distance of each score beyond its threshold in logits, (B, N); 0 or more means open."""
    score = table.score
    # The value is clamped, the slope stays: a clamp's own gradient is zero exactly where firmly closed gates are.
    score = score + (score.clamp(SMALLEST, 1 - 1e-6) - score).detach()
    return torch.log(score) - torch.log1p(-score) - torch.logit(table.threshold)


def weighted_norm(values: Tensor, weights: Tensor, p: float) -> Tensor:
    """``(sum w_i v_i^p)^(1/p)`` of non-negative values (B, N), shape (B,); where it is 0, so is its gradient."""
    return torch.linalg.vector_norm(weights ** (1 / p) * values, p, dim=1)


def per_unit(values: Sequence[float], table: GateTable, argument: str) -> Tensor:
    """``values`` as a row for the gates of ``table``, (N,)."""
    if len(values) != table.score.shape[1]:
        raise ValueError(f"{argument} holds {len(values)} values for a network of {table.score.shape[1]} units; give one per unit")
    return torch.tensor(values, dtype=table.score.dtype, device=table.score.device)
