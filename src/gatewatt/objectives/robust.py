"""The loss of energy-adversarial training, over a clean half and an attacked half of one batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput, Gate, gate_table
from gatewatt.objectives.base import CrossEntropy, Objective, Terms


class EnergyAdversarialObjective:
    """The clean objective, cross entropy on the attacked images, and gates that decide as an undefended parent decides on clean images.

    Asking only for a small difference between the two halves is answered by one fixed route for every image, which is no dynamic network any
    more. Distilling the parent's clean decisions into the gates of both halves keeps the routes and makes the attacked image follow its
    clean one.

    Args:
        clean: objective of the clean half (default: cross entropy).
        adversarial_weight: of the cross entropy on attacked images.
        distillation: weight of the binary cross entropy of G(x) and G(x') against the parent's decisions on x, a mean over units by lambda;
            0 needs no parent.

    Raises:
        ValueError: if a weight is negative.
    """

    def __init__(self, clean: Objective | None = None, *, adversarial_weight: float = 1.0, distillation: float = 2.0) -> None:
        if adversarial_weight < 0 or distillation < 0:
            raise ValueError(f"adversarial_weight and distillation must be at least 0, got {adversarial_weight} and {distillation}")
        self.clean, self.adversarial_weight, self.distillation = clean or CrossEntropy(), adversarial_weight, distillation

    def __call__(
        self,
        clean: DynamicOutput,
        adversarial: DynamicOutput,
        labels: Tensor,
        ledger: FlopsLedger,
        parent: Mapping[str, Gate] | None,
    ) -> Terms:
        """Weighted terms of a batch.

        Args:
            clean: output on the clean images.
            adversarial: output on the attacked images, in the same order.
            labels: (B,).
            ledger: prices, for lambda.
            parent: gates of the undefended parent on the clean images; may be None if ``distillation`` is 0.
        """
        terms = self.clean(clean, labels, ledger)
        attacked = functional.cross_entropy(adversarial.logits.float(), labels)
        terms["adversarial_cross_entropy"] = self.adversarial_weight * attacked
        if self.distillation:
            if parent is None:
                raise ValueError("distillation needs the parent's gates; give a parent or set distillation to 0")
            table = gate_table(parent)
            decided = (table.score >= table.threshold).float()
            weights = ledger.weights(parent).to(decided)
            # A score rounded to exactly 0 or 1 would make the logarithm infinite.
            scores = [gate_table(half.gates).score.clamp(1e-6, 1 - 1e-6) for half in (clean, adversarial)]
            # Written out: torch refuses its own binary cross entropy of probabilities under autocast on a GPU.
            apart = -torch.stack([decided * score.log() + (1 - decided) * (1 - score).log() for score in scores]).sum(0)
            terms["distillation"] = self.distillation * (apart * weights).sum(1).mean()
        return terms
