"""The loss of energy-adversarial training, over a clean half and an attacked half of one batch.

Two answers to one question, what the gates of an attacked image should do: decide as an undefended parent decides on the clean image (distillation),
or cost no more than the clean image costs now (the gaps). Every term has a weight of its own, and a weight of 0 removes the term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput, Gate, gate_table
from gatewatt.objectives.base import CrossEntropy, Objective, Terms

Distilled = Literal["asked", "executed"]
"""Of a parent's decisions: what its gates asked for, or what ran of it."""


class EnergyAdversarialObjective:
    """The clean objective, and what is asked of the attacked images beside it.

    Asking only for a small difference between the two halves is answered by one fixed route for every image, which is no dynamic network any
    more. Distilling the parent's clean decisions into the gates of both halves keeps the routes and makes the attacked image follow its
    clean one. The gaps need no parent; what keeps them from closing or opening every gate is a clean objective with a budget and a variance floor:
    ``ComputeTarget(target, weight, diversity=..., spread=...)``.

    Args:
        clean: objective of the clean half (default: cross entropy).
        adversarial_weight: of the cross entropy on attacked images.
        distillation: weight of the binary cross entropy of G(x) and G(x') against the parent's decisions on x, a mean over units by lambda;
            0 needs no parent.
        distilled: ``asked``, or behind a guard ``executed``: what the guard let through of it. A network that asks for what it gets is not at its cap
            before it is attacked. Not where gates lie within others, as exits do: later ones would be taught to stay closed.
        consistency: weight of :func:`divergence`, KL(f(x) || f(x')), as in TRADES.
        gap: weight of :func:`flops_gap`, what x' costs beyond x.
        slack: what it may cost beyond x, as a fraction of the dense FLOPs, in [0, 1].
        gate_gap: weight of :func:`gate_gap`, by how much the gates of x' stand above those of x.
        saturation: weight of :func:`saturation` on both halves. Gates that are far from their thresholds have no slope left, and look robust.
        limit: logits from 0 beyond which a gate counts as saturated, positive.
        ramp: parts of the run between which the radius of the attack and the weight of the gap rise linearly from 0. Before it batches are clean:
            gates must depend on the image before they can be defended. The default attacks from the start.

    Attributes:
        progress: how much of the run is done, in [0, 1); the training task sets it before every step.

    Raises:
        ValueError: if a weight is negative, or a value out of range.
    """

    progress: float = 0.0

    def __init__(
        self,
        clean: Objective | None = None,
        *,
        adversarial_weight: float = 1.0,
        distillation: float = 2.0,
        distilled: Distilled = "asked",
        consistency: float = 0.0,
        gap: float = 0.0,
        slack: float = 0.02,
        gate_gap: float = 0.0,
        saturation: float = 0.0,
        limit: float = 8.0,
        ramp: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        weights = {
            "adversarial_weight": adversarial_weight,
            "distillation": distillation,
            "consistency": consistency,
            "gap": gap,
            "gate_gap": gate_gap,
            "saturation": saturation,
        }
        for name, weight in weights.items():
            if not weight >= 0:
                raise ValueError(f"{name} must be at least 0, got {weight}")
        if not 0 <= slack <= 1:
            raise ValueError(f"slack must be in [0, 1], a fraction of the dense FLOPs, got {slack}")
        if not limit > 0:
            raise ValueError(f"limit must be positive, a distance in logits, got {limit}")
        if distilled not in get_args(Distilled):
            raise ValueError(f"distilled must be {' or '.join(get_args(Distilled))}, got {distilled!r}")
        start, end = ramp
        if not 0 <= start <= end <= 1:
            raise ValueError(f"ramp must be two parts of the run, 0 <= start <= end <= 1, got {start} and {end}")
        self.clean, self.adversarial_weight, self.distillation = clean or CrossEntropy(), adversarial_weight, distillation
        self.distilled: Distilled = distilled
        self.consistency, self.gap, self.slack, self.gate_gap = consistency, gap, slack, gate_gap
        self.saturation, self.limit, self.ramp = saturation, limit, (start, end)

    def strength(self) -> float:
        """Share of the attack's radius and of the gap's weight that is due at this point of the run, in [0, 1]; 0 while batches are clean."""
        start, end = self.ramp
        if self.progress >= end:
            return 1.0
        return max(self.progress - start, 0.0) / (end - start) if end > start else 0.0

    def __call__(
        self,
        clean: DynamicOutput,
        adversarial: DynamicOutput,
        labels: Tensor,
        ledger: FlopsLedger,
        parent: Mapping[str, Gate] | None,
    ) -> Terms:
        """Weighted terms of a batch: the clean objective's, and those with a weight above 0.

        Args:
            clean: output on the clean images.
            adversarial: output on the attacked images, in the same order.
            labels: (B,).
            ledger: prices, for lambda and the cost of an image.
            parent: gates of the undefended parent on the clean images; may be None if ``distillation`` is 0.
        """
        terms = self.clean(clean, labels, ledger)
        if self.adversarial_weight:
            attacked = functional.cross_entropy(adversarial.logits.float(), labels)
            terms["adversarial_cross_entropy"] = self.adversarial_weight * attacked
        if self.consistency:
            terms["consistency"] = self.consistency * divergence(clean, adversarial).mean()
        if self.gap:
            terms["gap"] = (self.strength() * self.gap * flops_gap(clean, adversarial, ledger, self.slack).mean()).float()
        if self.gate_gap:
            terms["gate_gap"] = (self.gate_gap * gate_gap(clean, adversarial, ledger).mean()).float()
        if self.saturation:
            halves = [saturation(half, ledger, self.limit).mean() for half in (clean, adversarial)]
            terms["saturation"] = (self.saturation * torch.stack(halves).mean()).float()
        if self.distillation:
            if parent is None:
                raise ValueError("distillation needs the parent's gates; give a parent or set distillation to 0")
            if self.distilled == "executed" and any(gate.within for gate in parent.values()):
                raise ValueError("distilled: executed would teach gates within others, such as exits, to stay closed; set distilled to asked")
            table = gate_table(parent)
            decided = table.executed.float() if self.distilled == "executed" else (table.score >= table.threshold).float()
            weights = ledger.weights(parent).to(decided)
            # A score rounded to exactly 0 or 1 would make the logarithm infinite.
            scores = [gate_table(half.gates).score.clamp(1e-6, 1 - 1e-6) for half in (clean, adversarial)]
            # Written out: torch refuses its own binary cross entropy of probabilities under autocast on a GPU.
            apart = -torch.stack([decided * score.log() + (1 - decided) * (1 - score).log() for score in scores]).sum(0)
            terms["distillation"] = self.distillation * (apart * weights).sum(1).mean()
        return terms


def divergence(clean: DynamicOutput, adversarial: DynamicOutput) -> Tensor:
    """KL(f(x) || f(x')) of the predictions, (B,); both sides are trained (Zhang et al., "TRADES", ICML 2019)."""
    log_clean, log_adversarial = (half.logits.float().log_softmax(1) for half in (clean, adversarial))
    return (log_clean.exp() * (log_clean - log_adversarial)).sum(1)


def flops_gap(clean: DynamicOutput, adversarial: DynamicOutput, ledger: FlopsLedger, slack: float = 0.0) -> Tensor:
    """What x' costs beyond x and ``slack``, as a fraction of the dense FLOPs, (B,) float64; an image that got cheaper counts nothing.

    Costs are those of :meth:`~gatewatt.flops.FlopsLedger.surrogate`: their values what runs, their slopes the scores'. That of x is a constant: to
    raise what clean images cost would close the gap as well.
    """
    spent = ledger.surrogate(adversarial.gates) - ledger.surrogate(clean.gates).detach()
    return torch.relu(spent / ledger.dense - slack)


def gate_gap(clean: DynamicOutput, adversarial: DynamicOutput, ledger: FlopsLedger) -> Tensor:
    """By how many logits the gates of x' stand above those of x, a mean over units by lambda, (B,) float64; those of x are constants.

    It sees an attack coming before a gate has opened, which :func:`flops_gap` does not.
    """
    rise = torch.relu(gate_logits(adversarial) - gate_logits(clean).detach())
    return (rise * ledger.weights(adversarial.gates)).sum(1)


def saturation(output: DynamicOutput, ledger: FlopsLedger, limit: float = 8.0) -> Tensor:
    """By how far the logits of the gates go beyond ``limit`` on either side, a mean over units by lambda, (B,) float64."""
    return (torch.relu(gate_logits(output).abs() - limit) * ledger.weights(output.gates)).sum(1)


def gate_logits(output: DynamicOutput) -> Tensor:
    """Logits of the scores of all gates, (B, N) float64, within -69 and 17: the scores that float32 can tell from 0 and 1.

    Example:
        >>> gate = Gate(torch.tensor([[0.5, 0.9, 1.0]]), torch.tensor(0.5), torch.ones(1, 3))
        >>> [round(logit, 3) for logit in gate_logits(DynamicOutput(torch.zeros(1, 2), {"a": gate})).tolist()[0]]
        [0.0, 2.197, 16.636]
    """
    # In float64, where one minus the smallest step of float32 is not rounded to 1.
    return gate_table(output.gates).score.double().clamp(1e-30, 1 - 2**-24).logit()
