"""How far an adversarial image is from its clean one, per image, on the scale of 8-bit levels.

Pixels are in [0, 1]; every figure is on the 0..255 scale, so one level is one step of an 8-bit image and PSNR has MAX = 255. Rounding to
8 bits alone costs a mean squared error of about 1/12: an attack below that may not survive being saved, hence :func:`round_to_8bit`.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255.0


def mse_levels2(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Mean squared error of each image in squared 8-bit levels.

    Args:
        clean: pixels in [0, 1], (B, C, H, W).
        adversarial: same shape.

    Returns:
        float64 (B,), mean over C, H and W.

    Raises:
        ValueError: if the shapes differ or a pixel is not finite.

    Example:
        >>> mse_levels2(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 2 / 255)).round(decimals=5).tolist()
        [4.0]
    """
    return _difference_levels(clean, adversarial).square().flatten(1).mean(dim=1)


def psnr_db(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, ``10 log10(255^2 / MSE)``.

    Args:
        clean: pixels in [0, 1], (B, C, H, W).
        adversarial: same shape.

    Returns:
        float64 (B,) in dB; infinite where the two images are identical.

    Raises:
        ValueError: if the shapes differ or a pixel is not finite.

    Example:
        >>> psnr_db(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.1)).round(decimals=3).tolist()
        [20.0]
    """
    return psnr_of_mse(mse_levels2(clean, adversarial))


def psnr_of_mse(mse: Tensor) -> Tensor:
    """PSNR in dB of a mean squared error in squared 8-bit levels; infinite at 0.

    Example:
        >>> psnr_of_mse(torch.tensor([0.11], dtype=torch.float64)).round(decimals=1).tolist()
        [57.7]
    """
    # Logarithms apart: 255^2 / MSE would overflow for the smallest MSE.
    return 20 * torch.log10(torch.tensor(LEVELS, dtype=torch.float64, device=mse.device)) - 10 * torch.log10(mse.to(torch.float64))


def linf_levels(clean: Tensor, adversarial: Tensor) -> Tensor:
    """Largest change of any pixel of each image, in 8-bit levels.

    Args:
        clean: pixels in [0, 1], (B, C, H, W).
        adversarial: same shape.

    Returns:
        float64 (B,).

    Raises:
        ValueError: if the shapes differ or a pixel is not finite.

    Example:
        >>> linf_levels(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 4 / 255)).round(decimals=5).tolist()
        [4.0]
    """
    return _difference_levels(clean, adversarial).abs().flatten(1).amax(dim=1)


def round_to_8bit(images: Tensor) -> Tensor:
    """What is left of ``images`` after saving them losslessly with 8 bits and loading them again.

    Args:
        images: pixels in [0, 1], any shape; values outside are clamped, as saving would.

    Returns:
        Multiples of 1/255 in [0, 1], shape and dtype of ``images``. Halves go to the even level.

    Example:
        >>> (round_to_8bit(torch.tensor([0.1, 0.5, 1.2])) * 255).tolist()
        [26.0, 128.0, 255.0]
    """
    return (images * LEVELS).round().clamp(0, LEVELS) / LEVELS


def _difference_levels(clean: Tensor, adversarial: Tensor) -> Tensor:
    if clean.shape != adversarial.shape or clean.ndim < 2 or 0 in clean.shape:
        raise ValueError(
            f"clean and adversarial images must have one shape (B, C, H, W), none of it 0, got {tuple(clean.shape)} and {tuple(adversarial.shape)}"
        )
    difference = (adversarial.to(torch.float64) - clean.to(torch.float64)) * LEVELS
    finite = torch.isfinite(difference).flatten(1).all(dim=1)
    if not bool(finite.all()):
        raise ValueError(f"images must be finite; image {int((~finite).nonzero()[0])} of the batch holds NaN or infinity")
    return difference
