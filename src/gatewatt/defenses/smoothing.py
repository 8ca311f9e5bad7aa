"""Median smoothing as a defense: each pixel becomes the median of its neighbourhood, channel by channel.

Xu et al., "Feature Squeezing" (NDSS 2018); GradMDM's Table 14 for computation, where the attacker does not know of it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional

from gatewatt.defenses.base import InputDefense


class MedianFilter(InputDefense):
    """The median of ``kernel`` x ``kernel`` windows, the border reflected. Its own derivative: each pixel's gradient goes to the median.

    Args:
        kernel: side of the window, odd and at least 3.

    Raises:
        ValueError: for another kernel, or images too small to be reflected.
    """

    def __init__(self, kernel: int = 3) -> None:
        super().__init__()
        if kernel < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and at least 3, got {kernel}")
        self.kernel = kernel

    @property
    def settings(self) -> dict[str, Any]:
        """Name and kernel."""
        return {"name": "MedianFilter", "kernel": self.kernel}

    def forward(self, images: Tensor) -> Tensor:
        """Smooth every image."""
        border = self.kernel // 2
        if min(images.shape[2:]) <= border:
            raise ValueError(f"a {self.kernel}x{self.kernel} median needs images larger than {border} pixels, got {tuple(images.shape)}")
        windows = functional.pad(images, (border,) * 4, mode="reflect").unfold(2, self.kernel, 1).unfold(3, self.kernel, 1)
        # Sorted rather than torch.median: the same value and gradient, by an operator whose FLOPs are known to be none.
        return windows.flatten(-2).sort(-1).values[..., self.kernel**2 // 2]
