"""JPEG compression as a defense: what a real codec loses, an attack may have put there.

Dziugaite et al., 2016, for accuracy; GradMDM's Table 14 for computation, where the attacker does not know of it.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gatewatt.defenses.base import InputDefense, with_identity_gradient


class JPEG(InputDefense):
    """Round to 8 bits, encode and decode with libjpeg (4:2:0 chroma, as files usually are); the gradient passes straight through.

    Args:
        quality: of the encoder, 1 to 100.

    Raises:
        ValueError: for a quality out of range.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise ValueError(f"quality must be in 1 to 100, got {quality}")
        self.quality = quality

    @property
    def settings(self) -> dict[str, Any]:
        """Name and quality."""
        return {"name": "JPEG", "quality": self.quality}

    def forward(self, images: Tensor) -> Tensor:
        """Compress and decompress every image."""
        levels = (255 * images.detach()).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        decoded = np.stack([self._recoded(image) for image in levels])
        return with_identity_gradient(torch.from_numpy(decoded).permute(0, 3, 1, 2).to(images) / 255, images)

    def _recoded(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=self.quality)
        return np.asarray(Image.open(file))
