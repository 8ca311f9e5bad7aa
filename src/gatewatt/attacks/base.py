"""What every energy attack is: images in, perturbed images out, the network left as it was."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork, check_images, check_labels, decision_named
from gatewatt.rounding import RELATIVE_SLACK


class AttackResult(NamedTuple):
    """What an attack returns.

    Attributes:
        images: perturbed images in [0, 1], (B, 3, H, W), float32.
        step: after how many updates each image was taken, (B,); the last one unless the best was kept.
        member: of an ensemble, the index of the member or round that each image is from, (B,); -1 where none improved on the image itself.
    """

    images: Tensor
    step: Tensor
    member: Tensor | None = None


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


class Attack(ABC):
    """A perturbation that makes a dynamic network run more than it would.

    A subclass implements :meth:`craft`. Images never interact: attacking a batch gives what attacking its images one by one gives.

    Args:
        decision: attack through this decision instead of the network's own, for example ``straight_through`` on a network whose own test-time
            decisions pass no gradient.
        name: label in records and tables; default: the class's name.
    """

    def __init__(self, *, decision: str | None = None, name: str | None = None) -> None:
        if decision is not None:
            decision_named(decision)
        self.decision, self.name = decision, name or type(self).__name__

    def __repr__(self) -> str:
        return self.name

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that determines the attack, as plain values, for records."""

    @abstractmethod
    def craft(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None, ledger: FlopsLedger) -> AttackResult:
        """Perturb valid images, with the network in eval mode, its parameters frozen and gradients enabled."""

    def __call__(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None = None, *, ledger: FlopsLedger | None = None) -> AttackResult:
        """Attack a batch.

        Args:
            network: the network to craft on; mode, parameters, statistics and random state are left as they were.
            images: (B, 3, H, W) in [0, 1].
            labels: (B,), accepted by every attack and needed by few.
            ledger: prices at the images' resolution; measured on the spot when left out.

        Raises:
            ValueError: if images or labels are invalid, the network has no gates, or a gradient was missing, NaN or infinite.
        """
        check_images(images)
        if labels is not None:
            check_labels(labels, images)
        ledger = ledger or price(network, images[:1])
        with under_attack(network, self.decision):
            # Copies that a graph may hold: those of a Trainer's test were made in inference mode.
            return self.craft(network, images.detach().clone().float(), None if labels is None else labels.clone(), ledger)


def described_part(part: object) -> dict[str, Any]:
    """Class and values of a loss, direction or space, as plain values for records; what is None is left out."""
    return {"kind": type(part).__name__, **{key: described_value(value) for key, value in vars(part).items() if value is not None}}


def described_value(value: Any) -> Any:
    """A value as JSON has it: numbers, text, lists and mappings as they are, other objects by class and values."""
    if value is None or isinstance(value, (int, float, str)):
        return value
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, (tuple, list)):
        return [described_value(element) for element in value]
    if isinstance(value, Mapping):
        return {str(key): described_value(element) for key, element in value.items()}
    return described_part(value) if hasattr(value, "__dict__") else repr(value)


class BrokenGradientError(ValueError):
    """A gradient was NaN or infinite.

    Attributes:
        image: index of the first such image in the batch.
    """

    def __init__(self, image: int) -> None:
        super().__init__(f"image {image} of the batch met a gradient that is NaN or infinite: it was not attacked")
        self.image = image


def refuse_broken(images: Tensor, rows: Tensor | None = None) -> None:
    """Raise if a gradient or a perturbed image (b, 3, H, W) is not finite; ``rows`` are their positions in the batch, if not 0, 1, 2 and on.

    A NaN image closes every gate and would be recorded as one that saved FLOPs.

    Raises:
        BrokenGradientError: naming the first such image.
    """
    broken = ~torch.isfinite(images).flatten(1).all(dim=1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise BrokenGradientError(first if rows is None else int(rows[first]))


class NoGradientError(ValueError):
    """No path of gradients leads from what an attack minimises back to the image."""


def image_gradient(loss: Tensor, image: Tensor, *, more: bool = False) -> Tensor:
    """Gradient of the summed loss (B,) with respect to ``image`` (B, 3, H, W); ``more`` keeps the graph for another call.

    Raises:
        NoGradientError: if the loss does not depend on the image by a differentiable path. An attack that went on would return the images as they
            were, and a network that merely hides its gradient would be recorded as one that withstands.
    """
    if not loss.requires_grad:
        raise NoGradientError(
            "no gradient leads from the network's scores to its images, so there is nothing to follow; "
            "attack without gradients (SquareSearch), or through another decision (decision='straight_through')"
        )
    return torch.autograd.grad(loss.sum(), image, retain_graph=more)[0]


def image_generator(image: Tensor, seed: int, draw: int = 0) -> torch.Generator:
    """Random numbers that depend on the seed, the draw and the image's own pixels alone, so that a batch gets what its images get one by one.

    Args:
        image: (3, H, W).
        seed: of the attack.
        draw: tells several sequences of one attack apart.
    """
    # One 32-bit hash of everything: torch's CPU generator ignores the upper half of a 64-bit seed.
    pixels = zlib.crc32(image.detach().cpu().contiguous().numpy().tobytes())
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {draw}".encode(), pixels))


def image_noise(images: Tensor, seed: int, draw: int = 0) -> Tensor:
    """Uniform noise in [0, 1) from :func:`image_generator`, shape, dtype and device of ``images`` (B, 3, H, W)."""
    drawn = [torch.rand(image.shape, generator=image_generator(image, seed, draw)) for image in images.detach().cpu()]
    return torch.stack(drawn).to(images)


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

    def offer(self, candidate: Tensor, flops: Tensor, step: int | Tensor, rows: Tensor | None = None) -> Tensor:
        """Take candidates for the images that they are better for; returns which these are, bool (b,).

        Args:
            candidate: (b, 3, H, W), b = B unless ``rows`` are given.
            flops: their true FLOPs, (b,).
            step: after how many updates, one number or (b,).
            rows: positions in the batch that the candidates are for, (b,); all of them when left out.
        """
        rows = torch.arange(len(self.images), device=self.images.device) if rows is None else rows
        candidate = candidate.detach()
        error = (candidate - self.original[rows]).square().mean((1, 2, 3))
        better = (flops > self.flops[rows]) | ((flops == self.flops[rows]) & (error < self.error[rows]))
        taken = rows[better]
        self.images[taken], self.flops[taken], self.error[taken] = candidate[better], flops[better], error[better]
        self.step[taken] = step[better] if isinstance(step, Tensor) else step
        return better

    def unfinished(self, ledger: FlopsLedger) -> Tensor:
        """Positions of the images whose best iterate does not run everything yet, (b,)."""
        return (self.flops < ledger.dense * (1 - RELATIVE_SLACK)).nonzero().flatten()

    @property
    def result(self) -> AttackResult:
        """The iterates kept."""
        return AttackResult(self.images, self.step)
