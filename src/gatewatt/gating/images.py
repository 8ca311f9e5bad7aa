"""What a valid batch of pixels, scores and logits is.

A NaN pixel makes every comparison with a threshold false, so all gates close and the image looks superbly efficient. Whatever is measured is
therefore checked to be finite first, and whatever enters from outside is checked to be an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatewatt.gating.gate import DynamicOutput


def check_images(images: Tensor) -> None:
    """Raise unless ``images`` is a float batch (B, 3, H, W) of finite values in [0, 1].

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: on a wrong shape, an empty batch, a NaN or infinity, or values outside [0, 1]; the first such image is named.

    Example:
        >>> check_images(torch.rand(2, 3, 8, 8))
        >>> check_images(2 * torch.ones(1, 3, 8, 8))
        Traceback (most recent call last):
        ...
        ValueError: images must be in [0, 1]; image 0 of the batch spans 2 to 2
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        raise TypeError(f"images must be a floating-point tensor in [0, 1], got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images must have shape (B, 3, H, W) with B, H, W >= 1, got {tuple(images.shape)}")
    low, high = images.flatten(1).aminmax(dim=1)
    # A comparison with NaN is false, so this one test catches NaN, infinity and range together.
    valid = (low >= 0) & (high <= 1)
    if not bool(valid.all()):
        index = int((~valid).nonzero()[0])
        if not bool(torch.isfinite(images[index]).all()):
            raise ValueError(f"images must be finite; image {index} of the batch holds NaN or infinity")
        raise ValueError(f"images must be in [0, 1]; image {index} of the batch spans {low[index].item():g} to {high[index].item():g}")


def check_labels(labels: Tensor, images: Tensor) -> None:
    """Raise unless there is one integer label per image."""
    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must have shape ({len(images)},), one per image, got {tuple(labels.shape)}")


def check_finite(output: DynamicOutput) -> None:
    """Raise if a logit or a score is NaN or infinite, naming the first image.

    Raises:
        ValueError: naming the tensor and the image within the batch.
    """
    named = {"logits": output.logits, **{f"the scores of gate {name!r}": gate.score for name, gate in output.gates.items()}}
    for name, values in named.items():
        bad = ~torch.isfinite(values).flatten(1).all(dim=1)
        if bool(bad.any()):
            raise ValueError(f"{name} hold NaN or infinity for image {int(bad.nonzero()[0])} of the batch: nothing was recorded")
