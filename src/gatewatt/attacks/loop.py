"""The one optimisation loop of every energy attack: a loss over gates, a direction, a space, and a penalty on the perturbation.

Pan et al., "GradMDM" (TPAMI 2023), Sec. 4. The penalty's gradient is analytic and is added after the direction was chosen, so masking never
touches it (Sec. 4.4). Each step costs one forward pass and one input-gradient, two with gradient masking.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gatewatt.attacks.directions import ComplexityOnly, ConflictMasking, Direction
from gatewatt.attacks.losses import ComplexityLoss, GateLoss, PowerLoss
from gatewatt.attacks.spaces import Space, TanhSpace
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork, check_finite, check_images, check_labels, decision_named, gate_table


class AttackResult(NamedTuple):
    """What an attack returns.

    Attributes:
        images: perturbed images in [0, 1], (B, 3, H, W), float32.
        step: after how many updates each image was taken, (B,); the last one unless the best was kept.
    """

    images: Tensor
    step: Tensor


@contextmanager
def under_attack(network: DynamicNetwork, decision: str | None = None) -> Iterator[None]:
    """Eval mode, frozen parameters, folded BatchNorm and gradients enabled within the block; everything as it was afterwards.

    Eval mode keeps BatchNorm statistics untouched and attacks the function that is deployed. Works inside ``no_grad`` and
    ``inference_mode``, so in every Lightning loop.

    Args:
        network: the network to attack.
        decision: name of the decision to attack through, instead of the network's own.
    """
    flags = {module: module.training for module in network.modules()}
    required = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    own = network.decision
    try:
        network.eval()
        for parameter, _ in required:
            parameter.requires_grad_(False)
        if decision is not None:
            network.decision = decision_named(decision)
        with torch.inference_mode(False), torch.enable_grad(), folded(network):
            yield
    finally:
        network.decision = own
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        for module, training in flags.items():
            module.training = training


@contextmanager
def folded(network: nn.Module) -> Iterator[None]:
    """Within the block, every BatchNorm that follows a convolution in an ``nn.Sequential`` is part of that convolution.

    In eval mode BatchNorm is a fixed scale and shift per channel; its backward pass costs as much as a small convolution all the same. The
    modules themselves are put back afterwards. Modules with hooks are left alone, so that what watches them still sees them.
    """
    swapped: list[tuple[nn.Sequential, int, nn.Conv2d, nn.BatchNorm2d]] = []
    try:
        for sequence in [module for module in network.modules() if type(module) is nn.Sequential]:
            for index, (convolution, norm) in enumerate(pairwise(list(sequence))):
                if not isinstance(convolution, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None:
                    continue
                # A subclass may compute something else, and folding would attack another function.
                if type(convolution) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
                    continue
                if not any(module._forward_hooks or module._forward_pre_hooks for module in (convolution, norm)):
                    # The fused weights lose channels_last otherwise, and every step would convert the activations.
                    dense = torch.channels_last if convolution.weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
                    sequence[index] = fuse_conv_bn_eval(convolution, norm).requires_grad_(False).to(memory_format=dense)
                    sequence[index + 1] = nn.Identity().eval()
                    swapped.append((sequence, index, convolution, norm))
        yield
    finally:
        for sequence, index, convolution, norm in swapped:
            sequence[index], sequence[index + 1] = convolution, norm


class EnergyAttack:
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
        name: label in records and tables.

    Raises:
        ValueError: for a value out of range.
    """

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
        name: str | None = None,
    ) -> None:
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
        if decision is not None:
            decision_named(decision)
        self.loss, self.direction, self.space = loss or PowerLoss(), direction or ConflictMasking(), space or TanhSpace()
        self.gamma, self.reduction, self.steps, self.warmup, self.lr = gamma, reduction, steps, warmup, lr
        self.keep, self.decision, self.name = keep, decision, name or type(self).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""
        parts = {"loss": self.loss, "direction": self.direction, "space": self.space}
        described: dict[str, dict[str, Any]] = {}
        for role, part in parts.items():
            plain_values = {key: value for key, value in vars(part).items() if isinstance(value, (int, float, str))}
            described[role] = {"kind": type(part).__name__, **plain_values}
        plain = {key: getattr(self, key) for key in ("gamma", "reduction", "steps", "warmup", "lr", "keep", "decision")}
        return {"name": self.name, **plain, **described}

    def __repr__(self) -> str:
        return f"{self.name}(gamma={self.gamma:g}, steps={self.steps})"

    def __call__(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None = None, *, ledger: FlopsLedger | None = None) -> AttackResult:
        """Attack a batch; images never interact, so a batch gives what its images give one by one.

        Args:
            network: the network to craft on; mode, parameters, statistics and random state are left as they were.
            images: (B, 3, H, W) in [0, 1].
            labels: (B,), accepted for every attack; this one does not need them.
            ledger: prices at the images' resolution; measured on the spot when left out.

        Raises:
            ValueError: if images or labels are invalid, the network has no gates, or a gradient was NaN or infinite.
        """
        check_images(images)
        if labels is not None:
            check_labels(labels, images)
        ledger = ledger or price(network, images[:1])
        with under_attack(network, self.decision):
            return self._descend(network, images.detach().clone().float(), ledger)

    def _descend(self, network: DynamicNetwork, images: Tensor, ledger: FlopsLedger) -> AttackResult:
        anchor = self.space.encode(images)
        delta = torch.zeros_like(images)
        optimizer = torch.optim.Adam([delta], self.lr)
        best = BestIterate(images) if self.keep == "best" else None
        warm = round(self.warmup * self.steps)
        # gamma times the gradient of the squared error is `pull * (x' - x)`, times the space's chain rule.
        pull = 2 * self.gamma / (images[0].numel() if self.reduction == "mean" else 1)
        weights: Tensor | None = None
        for step in range(self.steps):
            adversarial = self.space.image(anchor, delta).requires_grad_()
            output = network(adversarial, "masked")
            table = gate_table(output.gates)
            if weights is None:
                check_finite(output)
                weights = (ledger.weights(output.gates) * table.score.shape[1]).to(table.score)
            if best is not None:
                best.offer(adversarial, ledger(output.gates), step)
            position = adversarial.detach()

            def gradient(loss: Tensor, more: bool, at: Tensor = adversarial, position: Tensor = position) -> Tensor:
                return self.space.pullback(position, torch.autograd.grad(loss.sum(), at, retain_graph=more)[0])

            loss, direction = (ComplexityLoss(), ComplexityOnly()) if step < warm else (self.loss, self.direction)
            delta.grad = direction(loss, table, weights, gradient) + self.space.pullback(position, pull * (position - images))
            optimizer.step()
            delta = self._write(delta, self.space.restrict(anchor, delta))
        broken = ~torch.isfinite(delta).flatten(1).all(dim=1)
        if bool(broken.any()):
            # A NaN image closes every gate and would be recorded as an attack that saved FLOPs.
            raise ValueError(f"image {int(broken.nonzero()[0])} of the batch met a gradient that is NaN or infinite: it was not attacked")
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


class BestIterate:
    """Each image's iterate of most true FLOPs, ties broken by the smaller squared error.

    Args:
        images: the unperturbed batch, (B, 3, H, W).
    """

    def __init__(self, images: Tensor) -> None:
        self.original, self.images = images, images.clone()
        self.flops = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=images.device)
        self.error = torch.full((len(images),), torch.inf, device=images.device)
        self.step = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    def offer(self, candidate: Tensor, flops: Tensor, step: int) -> None:
        """Take ``candidate`` (B, 3, H, W) for the images it is better for."""
        candidate = candidate.detach()
        error = (candidate - self.original).square().mean((1, 2, 3))
        better = (flops > self.flops) | ((flops == self.flops) & (error < self.error))
        self.images = torch.where(better[:, None, None, None], candidate, self.images)
        self.flops, self.error = torch.where(better, flops, self.flops), torch.where(better, error, self.error)
        self.step = torch.where(better, step, self.step)

    @property
    def result(self) -> AttackResult:
        """The iterates kept."""
        return AttackResult(self.images, self.step)
