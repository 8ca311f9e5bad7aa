"""Recovery and mean FLOPs as torchmetrics, for validation and for several processes.

Only scalar sums are kept, in float64 and int64: whole FLOPs add up exactly, so any split of the images over processes gives the same
digits, and memory does not grow with the set. Per-image rows are the business of :mod:`gatewatt.metrics.record`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from gatewatt.rounding import RELATIVE_SLACK


class RecoveryTotals(NamedTuple):
    """Everything :class:`RecoveryPercent` knows, over all processes.

    Attributes:
        recovery_percent: ratio of sums; NaN if every image is at full FLOPs.
        recovery_per_image_percent: mean of per-image ratios over the images below full FLOPs; NaN if there is none.
        images: number of images seen.
        images_at_full_flops: images left out of the per-image mean because their clean pass spends full FLOPs anyway.
    """

    recovery_percent: float
    recovery_per_image_percent: float
    images: int
    images_at_full_flops: int


class RecoveryPercent(Metric):
    """``100 * sum(adv - clean) / sum(dense - clean)`` over all images of all processes.

    :meth:`compute` returns the ratio of sums; :meth:`totals` adds the per-image mean and the counts.

    Example:
        >>> metric = RecoveryPercent()
        >>> f = lambda *values: torch.tensor(values, dtype=torch.float64)
        >>> metric.update(f(40, 60, 100), f(70, 60, 100), 100.0)
        >>> metric.compute().item()
        30.0
        >>> metric.totals()
        RecoveryTotals(recovery_percent=30.0, recovery_per_image_percent=25.0, images=3, images_at_full_flops=1)
    """

    is_differentiable = False
    higher_is_better = None  # the attacker and the defender disagree
    full_state_update = False

    recovered: Tensor
    saved: Tensor
    ratios: Tensor
    images: Tensor
    at_full: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("recovered", "saved", "ratios"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("images", "at_full"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, clean: Tensor, adversarial: Tensor, dense: Tensor | float) -> None:
        """Add a batch.

        Args:
            clean: FLOPs of each clean image, float64 or integer, (B,).
            adversarial: FLOPs of each adversarial image, (B,).
            dense: FLOPs with every gate open, (B,) or one number.

        Raises:
            TypeError: on FLOPs in float32 or less, which is inexact above 16.8 MFLOPs.
            ValueError: on differing shapes, or a value that is not finite, negative or above dense; nothing is added then.
        """
        clean, adversarial = _exact(clean, "clean"), _exact(adversarial, "adversarial")
        if clean.shape != adversarial.shape:
            raise ValueError(f"clean and adversarial FLOPs must have one shape (B,), got {tuple(clean.shape)} and {tuple(adversarial.shape)}")
        dense = _exact(dense, "dense").to(clean.device) if isinstance(dense, Tensor) and dense.ndim else torch.full_like(clean, float(dense))
        if dense.shape != clean.shape:
            raise ValueError(f"dense FLOPs must be one number or have shape {tuple(clean.shape)}, got {tuple(dense.shape)}")
        for name, values in {"dense": dense, "clean": clean, "adversarial": adversarial}.items():
            valid = torch.isfinite(values) & (values >= 0) & (values <= dense * (1 + RELATIVE_SLACK))
            if not bool(valid.all()):
                index = int((~valid).nonzero()[0])
                raise ValueError(
                    f"{name} FLOPs must be finite, 0 or more and at most dense ({dense[index].item():g}); "
                    f"image {index} of the batch has {values[index].item():g}"
                )
        won, saved = adversarial - clean, dense - clean
        below_full = saved > RELATIVE_SLACK * dense
        self.recovered += won.sum()
        self.saved += saved.sum()
        self.ratios += (won[below_full] / saved[below_full]).sum()
        self.images += len(clean)
        self.at_full += (~below_full).sum()

    def compute(self) -> Tensor:
        """The ratio of sums in percent, float64 scalar; NaN if every image is at full FLOPs, where it is undefined."""
        undefined = self.images == self.at_full
        return torch.where(undefined, torch.nan, 100 * self.recovered / self.saved)

    def totals(self) -> RecoveryTotals:
        """Both definitions and the counts over all processes; a collective call, so every process must make it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            below_full = int(self.images - self.at_full)
            return RecoveryTotals(
                recovery_percent=float(100 * self.recovered / self.saved) if below_full else float("nan"),
                recovery_per_image_percent=float(100 * self.ratios / below_full) if below_full else float("nan"),
                images=int(self.images),
                images_at_full_flops=int(self.at_full),
            )


class MeanFlops(Metric):
    """Mean FLOPs per image in MACs, exact over any split of the images.

    Example:
        >>> metric = MeanFlops()
        >>> metric.update(torch.tensor([1e9, 3e9], dtype=torch.float64))
        >>> metric.compute().item()
        2000000000.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    flops: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("flops", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, flops: Tensor) -> None:
        """Add the FLOPs of a batch, float64 or integer, (B,).

        Raises:
            TypeError: on FLOPs in float32 or less.
            ValueError: on another shape, or a value that is negative or not finite.
        """
        flops = _exact(flops, "the")
        valid = torch.isfinite(flops) & (flops >= 0)
        if not bool(valid.all()):
            index = int((~valid).nonzero()[0])
            raise ValueError(f"FLOPs must be finite and 0 or more; image {index} of the batch has {flops[index].item():g}")
        self.flops += flops.sum()
        self.images += len(flops)

    def compute(self) -> Tensor:
        """Mean over all images, float64 scalar; NaN before the first image."""
        return self.flops / self.images


def _exact(flops: Tensor, name: str) -> Tensor:
    if flops.dtype in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} FLOPs must be float64 ({flops.dtype} is inexact above 16.8 MFLOPs); use the ledger's output as it is")
    if flops.ndim != 1:
        raise ValueError(f"{name} FLOPs must have shape (B,), one per image, got {tuple(flops.shape)}")
    return flops.detach().to(torch.float64)
