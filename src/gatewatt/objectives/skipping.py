"""Losses of networks that skip blocks: an explicit compute target, and SkipNet's hybrid reinforcement stage."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput, gate_table
from gatewatt.objectives.base import CrossEntropy, Objective, Terms


class ComputeTarget(Objective):
    """Cross entropy plus ``weight (mean FLOPs / dense FLOPs - target)^2``, the mean taken over the batch, and optionally a variance floor.

    SkipNet's supervised stage has no cost term, so a run may end near 100 % computation, where recovered FLOPs mean nothing. The target
    binds the batch, not the image: which image gets how much is left to the gates. On an easy data set they may settle on one route for all
    images, which is a static network; the variance floor ``diversity relu(spread - variance of a score over the batch, mean over units)``
    keeps them apart.

    Args:
        target: fraction of the dense FLOPs, in (0, 1].
        weight: of the squared deviation.
        diversity: weight of the variance floor; 0 leaves it out.
        spread: the variance below which the floor acts. Scores that never cross 0.5 cannot exceed 0.0625; half zeros and half ones have 0.25.
        descent: parts of the run between which the bound falls linearly from 1 (all gates open) to ``target``. The default holds the target
            from the start; deep networks learn better features if their blocks are first trained with open gates. Equal parts are a step.
        label_smoothing: of the cross entropy, in [0, 1).

    Raises:
        ValueError: if ``target`` is outside (0, 1], ``spread`` outside [0, 0.25], ``descent`` falling or outside [0, 1], or a weight negative.
    """

    def __init__(
        self,
        target: float = 0.7,
        weight: float = 10.0,
        *,
        diversity: float = 0.0,
        spread: float = 0.1,
        descent: tuple[float, float] = (0.0, 0.0),
        label_smoothing: float = 0.0,
    ) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target must be in (0, 1], a fraction of the dense FLOPs, got {target}")
        if weight < 0 or diversity < 0:
            raise ValueError(f"weight and diversity must be at least 0, got {weight} and {diversity}")
        if not 0 <= spread <= 0.25:
            raise ValueError(f"spread must be in [0, 0.25], the variance of a score, got {spread}")
        start, end = descent
        if not 0 <= start <= end <= 1:
            raise ValueError(f"descent must be two parts of the run, 0 <= start <= end <= 1, got {start} and {end}")
        self.target, self.weight, self.diversity, self.spread, self.descent = target, weight, diversity, spread, (start, end)
        self.prediction = CrossEntropy(label_smoothing)

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``cross_entropy``, ``compute`` and, if asked for, ``diversity``."""
        fraction = ledger.surrogate(output.gates).mean() / ledger.dense
        terms = {**self.prediction(output, labels, ledger), "compute": (self.weight * (fraction - self.bound()) ** 2).float()}
        if self.diversity:
            # Of the scores, not of the decisions: a gate that decides alike for a whole batch would get no gradient to part the images again.
            terms["diversity"] = self.diversity * torch.relu(self.spread - gate_table(output.gates).score.var(0, unbiased=False).mean())
        return terms

    def bound(self) -> float:
        """The fraction asked for at this point of the run."""
        start, end = self.descent
        if self.progress >= end:
            return self.target
        if self.progress <= start:
            return 1.0
        return 1 - (self.progress - start) / (end - start) * (1 - self.target)


class HybridReinforcement(Objective):
    """SkipNet's HRL stage: cross entropy plus REINFORCE on sampled decisions (Wang et al. 2018, Sec. 3.3).

    Reward of gate i is ``(alpha / N) (1 - a_i)`` for decision a_i; its return is the rewards from i on minus the image's cross entropy;
    the policy term is ``policy_weight R_i (-log pi(a_i))`` with R detached, per image. Both of the original's stages are written in this
    CIFAR form: its ImageNet code multiplies a (B,) by a (B, 1) tensor and so credits every image with the batch's mean return. The
    original sums over a batch of 128 with weight 0.01, which is 1.28 times the mean used here.

    Args:
        alpha: reward scale (0.1 CIFAR, 0.01 ImageNet).
        policy_weight: weight of the policy term, as a mean over images and a sum over gates.
        baseline: subtract the batch-mean return per gate (not in the original).
    """

    def __init__(self, alpha: float = 0.1, policy_weight: float = 1.28, *, baseline: bool = False) -> None:
        if alpha < 0 or policy_weight < 0:
            raise ValueError(f"alpha and policy_weight must be at least 0, got {alpha} and {policy_weight}")
        self.alpha, self.policy_weight, self.baseline = alpha, policy_weight, baseline

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``cross_entropy`` and ``policy``."""
        cross_entropy = functional.cross_entropy(output.logits.float(), labels, reduction="none")
        score, _, action = gate_table(output.gates)
        reward = self.alpha / score.shape[1] * (1 - action)
        returns = reward.flip(1).cumsum(1).flip(1) - cross_entropy.detach()[:, None]
        if self.baseline:
            returns = returns - returns.mean(0, keepdim=True)
        probability = torch.where(action > 0, score, 1 - score).clamp_min(1e-8)
        policy = -(returns.detach() * probability.log()).sum(1).mean()
        return {"cross_entropy": cross_entropy.mean(), "policy": self.policy_weight * policy}
