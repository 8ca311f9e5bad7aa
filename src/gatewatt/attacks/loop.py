"""The optimisation loop of GradMDM and its kin: a loss over gates, a direction, a space, and a penalty on the perturbation.

Pan et al., "GradMDM" (TPAMI 2023), Sec. 4. The penalty's gradient is analytic and is added after the direction was chosen, so masking never
touches it (Sec. 4.4). Each step costs one forward pass and one input-gradient, two with gradient masking.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.attacks.base import Attack, AttackResult, BestIterate, described_part, described_value, image_gradient, refuse_broken
from gatewatt.attacks.directions import ComplexityOnly, ConflictMasking, Direction
from gatewatt.attacks.losses import ComplexityLoss, GateLoss, PowerLoss
from gatewatt.attacks.spaces import Space, TanhSpace, image_norm, unit_length
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, check_finite, gate_table


class EnergyAttack(Attack):
    """Find a small perturbation that makes a dynamic network run everything.

    The defaults are GradMDM's; :mod:`gatewatt.attacks.zoo` names the published variants. Deterministic: no random start, no random numbers.

    Args:
        loss: loss on closed gates (default :class:`PowerLoss` with alpha 4).
        direction: how the gradient is chosen (default :class:`ConflictMasking`).
        space: where the perturbation lives (default :class:`TanhSpace`).
        gamma: weight of the squared error; 100 in the paper, whose units are open. Compare attacks at matched error, never at equal gamma.
        reduction: ``mean`` over 3HW (independent of the image size) or ``sum`` (the paper's squared L2 norm, read literally), on the [0, 1] scale.
        steps: iterations (100).
        warmup: fraction of the steps that follow Eq. 6 alone (0.2; the authors' release uses 0.1).
        lr: Adam's learning rate (0.01, as both releases; the paper does not say).
        keep: ``last`` iterate (the paper), or each image's ``best`` by true FLOPs, then by squared error; costs one more forward pass.
        decision: attack through this decision instead of the network's own, for example ``straight_through`` on an HRL network, whose own
            test-time decisions pass no gradient (the release attacks them as they are).
        prediction_weight: weight of the squared distance of the logits from the clean ones, which keeps the prediction (the release's 1e5, with
            a squared error summed over the image); its gradient is not masked. 0 leaves it out; otherwise it costs one more input-gradient.
        cross_entropy_weight: of the cross entropy of the labels, a second aim: positive to keep images classified right while they spend, negative
            to have them misclassified as well. Its gradient counts in lengths of the gates' own, so that 1 weighs both alike in any network, and
            unlike ``prediction_weight`` it has a slope at the image itself. 0 leaves it out; otherwise it costs one more input-gradient.
        weighing: of the units in every loss: by the ``flops`` each can save (lambda, Sec. 4.4), or all ``equal`` (the releases).
        name: label in records and tables.

    Raises:
        ValueError: for a value out of range; on use, without the labels that ``cross_entropy_weight`` needs.
    """

    cross_entropy_weight: float | Tensor

    def __init__(
        self,
        loss: GateLoss | None = None,
        direction: Direction | None = None,
        *,
        space: Space | None = None,
        gamma: float = 100.0,
        reduction: Literal["mean", "sum"] = "mean",
        steps: int = 100,
        warmup: float = 0.2,
        lr: float = 0.01,
        keep: Literal["last", "best"] = "last",
        decision: Literal["straight_through", "hard"] | None = None,
        prediction_weight: float = 0.0,
        cross_entropy_weight: float = 0.0,
        weighing: Literal["flops", "equal"] = "flops",
        name: str | None = None,
    ) -> None:
        if weighing not in ("flops", "equal"):
            raise ValueError(f"weighing must be flops or equal, got {weighing!r}")
        if not 0 <= prediction_weight < math.inf:
            raise ValueError(f"prediction_weight must be finite and at least 0, got {prediction_weight}")
        if not math.isfinite(cross_entropy_weight):
            raise ValueError(f"cross_entropy_weight must be finite, got {cross_entropy_weight}")
        if not 0 <= gamma < math.inf:
            raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup must be in [0, 1], a fraction of the steps, got {warmup}")
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be finite and positive, got {lr}")
        if reduction not in ("mean", "sum") or keep not in ("last", "best"):
            raise ValueError(f"reduction must be mean or sum and keep last or best, got {reduction!r} and {keep!r}")
        super().__init__(decision=decision, name=name)
        self.loss, self.direction, self.space = loss or PowerLoss(), direction or ConflictMasking(), space or TanhSpace()
        self.gamma, self.reduction, self.steps, self.warmup, self.lr = gamma, reduction, steps, warmup, lr
        self.keep, self.prediction_weight, self.weighing = keep, prediction_weight, weighing
        self.cross_entropy_weight = cross_entropy_weight

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        described = {"loss": described_part(self.loss), "direction": described_part(self.direction), "space": described_part(self.space)}
        numbers = ("gamma", "reduction", "steps", "warmup", "lr", "keep", "decision", "prediction_weight", "cross_entropy_weight", "weighing")
        plain = {key: described_value(getattr(self, key)) for key in numbers}
        return {"name": self.name, **plain, **described}

    def __repr__(self) -> str:
        return f"{self.name}(gamma={self.gamma:g}, steps={self.steps})"

    def aimed(self, weights: Tensor) -> EnergyAttack:
        """This attack with a ``cross_entropy_weight`` of its own for every image of one batch, (B,)."""
        aimed = copy.copy(self)
        aimed.cross_entropy_weight = weights
        return aimed

    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Adam on ``delta``, step by step."""
        with self.direction.attached(network) as direction:
            return self._descend(network, images, labels, ledger, direction)

    def _descend(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger, masked: Direction) -> AttackResult:
        anchor = self.space.encode(images)
        delta = torch.zeros_like(images)
        optimizer = torch.optim.Adam([delta], self.lr)
        best = BestIterate(images) if self.keep == "best" else None
        warm = round(self.warmup * self.steps)
        # gamma times the gradient of the squared error is `pull * (x' - x)`, times the space's chain rule.
        pull = 2 * self.gamma / (images[0].numel() if self.reduction == "mean" else 1) / self.space.unit(images) ** 2
        weights: Tensor | None = None
        aims = torch.as_tensor(self.cross_entropy_weight).to(images).expand(len(images)).view(-1, 1, 1, 1)
        aimed = bool(aims.any())
        if aimed and labels is None:
            raise ValueError(f"{self.name} has the cross entropy of the true classes for a second aim: give labels")
        clean_logits: Tensor | None = None
        if self.prediction_weight:
            with torch.no_grad():
                clean_logits = network(images, "masked").logits
        for step in range(self.steps):
            adversarial = self.space.image(anchor, delta).requires_grad_()
            output = network(adversarial, "masked")
            table = gate_table(output.gates)
            if weights is None:
                check_finite(output)
                weights = (ledger.weights(output.gates) * table.score.shape[1]).to(table.score)
                if self.weighing == "equal":
                    weights = torch.ones_like(weights)
            if best is not None:
                best.offer(adversarial, ledger(output.gates), step)
            position = adversarial.detach()

            def gradient(loss: Tensor, more: bool, at: Tensor = adversarial, position: Tensor = position) -> Tensor:
                return self.space.pullback(position, image_gradient(loss, at, more=more))

            loss, direction = (ComplexityLoss(), ComplexityOnly()) if step < warm else (self.loss, masked)
            kept = 0.0 if clean_logits is None else gradient(self.prediction_weight * (output.logits - clean_logits).square().sum(1), True)
            aside: Tensor | None = None
            if labels is not None and aimed:
                aside = gradient(functional.cross_entropy(output.logits.float(), labels, reduction="none"), True)
            chosen = direction(loss, table, weights, gradient)
            if aside is not None:
                chosen = chosen + aims * image_norm(chosen) * unit_length(aside)
            delta.grad = chosen + kept + self.space.pullback(position, pull * (position - images))
            optimizer.step()
            delta = self._write(delta, self.space.restrict(anchor, delta))
        refuse_broken(delta)
        final = self.space.image(anchor, delta)
        if best is not None:
            with torch.no_grad():
                best.offer(final, ledger(network(final, "masked").gates), self.steps)
            return best.result
        return AttackResult(final, torch.full((len(images),), self.steps, device=images.device))

    @staticmethod
    def _write(delta: Tensor, restricted: Tensor) -> Tensor:
        # In place: the optimiser holds this very tensor.
        return delta if restricted is delta else delta.copy_(restricted)
