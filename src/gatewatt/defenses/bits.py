"""Bit-depth reduction as a defense: fewer levels leave less room for a small perturbation.

Xu et al., "Feature Squeezing" (NDSS 2018).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gatewatt.defenses.base import InputDefense, with_identity_gradient


class BitDepth(InputDefense):
    """Round every channel to 2^bits evenly spaced levels from 0 to 1; the gradient passes straight through.

    Args:
        bits: 1 to 8.

    Raises:
        ValueError: for another number of bits.

    Example:
        >>> import torch
        >>> BitDepth(1)(torch.tensor([0.2, 0.7])).tolist()
        [0.0, 1.0]
    """

    def __init__(self, bits: int = 4) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise ValueError(f"bits must be in 1 to 8, got {bits}")
        self.bits = bits

    @property
    def settings(self) -> dict[str, Any]:
        """Name and bits."""
        return {"name": "BitDepth", "bits": self.bits}

    def forward(self, images: Tensor) -> Tensor:
        """Quantise every image."""
        steps = 2**self.bits - 1
        return with_identity_gradient((images.detach() * steps).round() / steps, images)
