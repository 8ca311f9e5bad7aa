"""What a defense is: a network around a network, or a transform of the pixels before one.

The pair is a dynamic network again, so an attack on it is an attack through the defense (adaptive) without a line of its own. A transform
that has no useful derivative passes the gradient straight through (backward pass differentiable approximation, Athalye et al., ICML 2018).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gatewatt.gating import Charge, Decision, DynamicNetwork, DynamicOutput, Execution


class InputDefense(nn.Module, ABC):
    """A transform of pixels: images (B, 3, H, W) in [0, 1] to images of the same shape in [0, 1], each on its own.

    Attributes:
        randomised: whether two calls on one image may differ. None of those here does. Attacks follow one draw and average over none (no
            expectation over transformations), so against a randomised defense their figures flatter the defense.
    """

    randomised: bool = False

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Name and everything that determines the transform, as plain values, for records."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Transform images; the gradient must reach them."""


def with_identity_gradient(transformed: Tensor, images: Tensor) -> Tensor:
    """The value of ``transformed`` to the last bit, with the gradient of ``images``.

    Example:
        >>> images = torch.tensor([0.2, 0.7], requires_grad=True)
        >>> rounded = with_identity_gradient(images.detach().round(), images)
        >>> rounded.tolist(), torch.autograd.grad(rounded.sum(), images)[0].tolist()
        ([0.0, 1.0], [1.0, 1.0])
    """
    # The difference is exactly zero, or NaN where a pixel is: a codec must not launder a NaN into a valid image.
    return transformed + (images - images.detach())


class Wrapper(DynamicNetwork):
    """A network around a network: same gates, prices, decisions and weights.

    Its state dict is the inner network's, so weights move freely between a network and its defended twin. Whatever decision is dictated to it
    (``forced``, an attack's ``straight_through``) is dictated to the inner network.

    Args:
        network: the network inside.
    """

    def __init__(self, network: DynamicNetwork) -> None:
        super().__init__()
        self.network = network
        self.arguments = network.arguments
        self.executions = network.executions
        self.charges = tuple(Charge(f"network.{module}", gates) for module, gates in network.charges)
        self.overhead = tuple(f"network.{module}" for module in network.overhead)
        self.register_state_dict_post_hook(_drop_level)
        self.register_load_state_dict_pre_hook(_add_level)

    @property
    def decision(self) -> Decision:
        """The inner network's."""
        return self.network.decision

    @decision.setter
    def decision(self, decision: Decision) -> None:
        self.network.decision = decision

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Name and settings of the defense alone, as plain values, for records."""


def _drop_level(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    inner = f"{prefix}network."
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _add_level(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    own = tuple(f"{prefix}{name}." for name in module._modules if name != "network")
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
        state[f"{prefix}network.{key.removeprefix(prefix)}"] = state.pop(key)


class Defended(Wrapper):
    """A network behind a transform of its pixels.

    Prices are the network's: what the transform computes (a codec, a sort) is no multiply-accumulate of the network and is not counted.

    Args:
        network: the network to defend.
        defense: the transform.

    Example:
        >>> from gatewatt.defenses import JPEG
        >>> from gatewatt.networks import SkipNet
        >>> defended = Defended(SkipNet(8, width=4), JPEG(quality=75))
        >>> defended(torch.rand(2, 3, 32, 32)).logits.shape, defended.settings
        (torch.Size([2, 10]), {'name': 'JPEG', 'quality': 75})
    """

    def __init__(self, network: DynamicNetwork, defense: InputDefense) -> None:
        super().__init__(network)
        self.defense = defense

    @property
    def settings(self) -> dict[str, Any]:
        """The transform's."""
        return self.defense.settings

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """The network on transformed images."""
        return self.network(self.defense(images), execution)


def bare(network: DynamicNetwork) -> DynamicNetwork:
    """The network inside all its wrappers."""
    while isinstance(network, Wrapper):
        network = network.network
    return network


def described(network: DynamicNetwork) -> dict[str, Any] | None:
    """The defense of a network as plain values for records: None without one; of several the outermost first."""
    parts = []
    while isinstance(network, Wrapper):
        parts.append(network.settings)
        network = network.network
    if len(parts) < 2:
        return parts[0] if parts else None
    return {"name": " + ".join(part["name"] for part in parts), "parts": parts}


@contextmanager
def decided_by(network: DynamicNetwork, decision: Decision) -> Iterator[None]:
    """Let ``decision`` decide every gate of ``network`` within the block."""
    own = network.decision
    network.decision = decision
    try:
        yield
    finally:
        network.decision = own


def blank_image(network: DynamicNetwork, size: int) -> Tensor:
    """One grey image (1, 3, size, size) where the network's weights are, to learn its layout from."""
    if size < 1:
        raise ValueError(f"size must be at least 1, the side of the images in pixels, got {size}")
    parameter = next(network.parameters())
    return torch.full((1, 3, size, size), 0.5, device=parameter.device)
