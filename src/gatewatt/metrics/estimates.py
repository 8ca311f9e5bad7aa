"""Recovery, its uncertainty, and routes, from plain columns of numbers.

numpy only: these formulas serve the evaluation (torch tensors are taken too, from any device) as well as the reports, which read result
files and never import torch. Definitions: the ratio of sums is primary, the mean of per-image ratios stands beside it, and images that
spend full FLOPs anyway are left out of the latter and counted.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gatewatt.rounding import RELATIVE_SLACK

Column = NDArray[np.float64]


class PerImageRecovery(NamedTuple):
    """The mean of per-image recoveries.

    Attributes:
        percent: mean over the images below full FLOPs; NaN if there is none.
        left_out: number of images at full FLOPs, whose recovery is undefined.
    """

    percent: float
    left_out: int


class RouteStatistics(NamedTuple):
    """How much the executed units depend on the image.

    Attributes:
        routes: number of distinct patterns of executed units.
        gate_variance: variance of a unit's decision over images, p (1 - p), averaged over units; 0 for a static network, at most 0.25.
        static_percent: share of units that ran for every image or for none, in percent.
        entropy_bits: entropy of the distribution of routes. For a deterministic network this is the mutual information of route and image;
            it is estimated from the sample, so it cannot exceed log2 of the number of images.
    """

    routes: int
    gate_variance: float
    static_percent: float
    entropy_bits: float


def as_numpy(values: Any) -> Column:
    """A float64 array of anything array-like, including a torch tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def flops_columns(clean: Any, adversarial: Any, dense: Any) -> tuple[Column, Column, Column]:
    """Check the three FLOPs of every image and return them as float64 arrays (n,).

    Args:
        clean: FLOPs on the clean image, (n,).
        adversarial: FLOPs on the adversarial image, (n,).
        dense: FLOPs with every gate open, (n,) or one number for all.

    Raises:
        ValueError: on shapes that differ, no image, a value that is not finite, or FLOPs above dense, naming the first such image.
    """
    f_clean, f_adversarial = as_numpy(clean), as_numpy(adversarial)
    if f_clean.ndim != 1 or f_clean.shape != f_adversarial.shape or len(f_clean) == 0:
        raise ValueError(f"clean and adversarial FLOPs must have one shape (n,), n >= 1, got {f_clean.shape} and {f_adversarial.shape}")
    f_dense = as_numpy(dense)
    if f_dense.shape not in {(), f_clean.shape}:
        raise ValueError(f"dense FLOPs must be one number or have shape {f_clean.shape}, got {f_dense.shape}")
    f_dense = np.broadcast_to(f_dense, f_clean.shape)
    for name, values in {"dense": f_dense, "clean": f_clean, "adversarial": f_adversarial}.items():
        # A comparison with NaN is false, so this catches NaN, infinity and excess together.
        bad = ~((values >= 0) & (values <= f_dense * (1 + RELATIVE_SLACK)) & np.isfinite(values))
        if bad.any():
            index = int(bad.argmax())
            raise ValueError(f"{name} FLOPs must be finite, 0 or more and at most dense ({f_dense[index]:g}); image {index} has {values[index]:g}")
    return f_clean, f_adversarial, f_dense


def recovery_percent(clean: Any, adversarial: Any, dense: Any) -> float:
    """Share of the saved FLOPs that the attack won back: ``100 * sum(adv - clean) / sum(dense - clean)``.

    Args:
        clean: FLOPs on clean images, (n,).
        adversarial: FLOPs on adversarial images, (n,).
        dense: FLOPs with every gate open, (n,) or one number.

    Returns:
        Percent: 0 without change, 100 if every image reached full FLOPs, negative if the attack saved FLOPs. NaN if every clean image
        is at full FLOPs already: nothing was saved, so nothing can be recovered and the ratio is undefined.

    Raises:
        ValueError: see :func:`flops_columns`.

    Example:
        >>> recovery_percent([40.0, 60.0], [70.0, 60.0], 100.0)
        30.0
    """
    f_clean, f_adversarial, f_dense = flops_columns(clean, adversarial, dense)
    if not _saves(f_clean, f_dense).any():
        return math.nan
    return float(100 * (f_adversarial - f_clean).sum() / (f_dense - f_clean).sum())


def recovery_per_image_percent(clean: Any, adversarial: Any, dense: Any) -> PerImageRecovery:
    """Mean over images of ``100 * (adv - clean) / (dense - clean)``, without the images at full FLOPs, which are counted.

    Args:
        clean: FLOPs on clean images, (n,).
        adversarial: FLOPs on adversarial images, (n,).
        dense: FLOPs with every gate open, (n,) or one number.

    Example:
        >>> recovery_per_image_percent([40.0, 60.0, 100.0], [70.0, 60.0, 100.0], 100.0)
        PerImageRecovery(percent=25.0, left_out=1)
    """
    f_clean, f_adversarial, f_dense = flops_columns(clean, adversarial, dense)
    saves = _saves(f_clean, f_dense)
    left_out = int((~saves).sum())
    if not saves.any():
        return PerImageRecovery(math.nan, left_out)
    ratios = (f_adversarial - f_clean)[saves] / (f_dense - f_clean)[saves]
    return PerImageRecovery(float(100 * ratios.mean()), left_out)


def bootstrap_sums(columns: Column, *, draws: int = 2000, seed: int = 0) -> Column:
    """Sums of every column over images drawn with replacement.

    The draws depend on (seed, number of images) alone and are shared by all columns, so differences between columns are paired by image.

    Args:
        columns: (n, k), one row per image.
        draws: number of resamples.
        seed: of the draws.

    Returns:
        (draws, k).
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    n = len(columns)
    generator = np.random.default_rng(seed)
    sums = np.empty((draws, columns.shape[1]))
    # Counts times columns instead of gathering: all runs of a sweep cost one matrix product. Chunks bound the memory to about 32 MB.
    chunk = max(1, 4_000_000 // n)
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        drawn = generator.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums[start : start + size] = counts.astype(np.float64) @ columns
    return sums


def ratio_percent(numerator: Column, denominator: Column) -> Column:
    """``100 * numerator / denominator`` elementwise, NaN where the denominator is 0."""
    percent = np.full(numerator.shape, np.nan)
    np.divide(100 * numerator, denominator, out=percent, where=denominator > 0)
    return percent


def percentile_interval(samples: Column, level: float = 95.0) -> tuple[float, float]:
    """The central ``level`` percent of ``samples``, ignoring NaN; (NaN, NaN) if nothing is left."""
    if not 0 < level < 100:
        raise ValueError(f"level must lie between 0 and 100 percent, got {level:g}")
    finite = samples[np.isfinite(samples)]
    if len(finite) == 0:
        return math.nan, math.nan
    low, high = np.percentile(finite, [50 - level / 2, 50 + level / 2])
    return float(low), float(high)


def bootstrap_interval(clean: Any, adversarial: Any, dense: Any, *, draws: int = 2000, seed: int = 0, level: float = 95.0) -> tuple[float, float]:
    """Percentile bootstrap interval of :func:`recovery_percent` over images.

    It tells how the figure varies with the choice of images; other training seeds and attack seeds are not in it.

    Args:
        clean: FLOPs on clean images, (n,).
        adversarial: FLOPs on adversarial images, (n,).
        dense: FLOPs with every gate open, (n,) or one number.
        draws: number of resamples.
        seed: of the resampling.
        level: coverage in percent.

    Returns:
        Lower and upper end in percent; (NaN, NaN) where the recovery is undefined.

    Example:
        >>> bootstrap_interval([40.0, 40.0], [70.0, 70.0], 100.0)
        (50.0, 50.0)
    """
    f_clean, f_adversarial, f_dense = flops_columns(clean, adversarial, dense)
    if not _saves(f_clean, f_dense).any():
        return math.nan, math.nan
    sums = bootstrap_sums(np.stack([f_adversarial - f_clean, f_dense - f_clean], axis=1), draws=draws, seed=seed)
    return percentile_interval(ratio_percent(sums[:, 0], sums[:, 1]), level)


def route_statistics(executed: Any) -> RouteStatistics:
    """How much the executed units vary over images.

    Args:
        executed: 0 or 1, shape (n, N): what ran, as ``gate_table(gates).executed``.

    Raises:
        ValueError: on another shape, no image, no unit, or values other than 0 and 1.

    Example:
        >>> route_statistics([[1, 0, 1], [1, 1, 0]])
        RouteStatistics(routes=2, gate_variance=0.16666666666666666, static_percent=33.33333333333333, entropy_bits=1.0)
    """
    units = as_numpy(executed)
    if units.ndim != 2 or 0 in units.shape:
        raise ValueError(f"executed must have shape (n, N) with n, N >= 1, got {units.shape}")
    if not np.isin(units, (0.0, 1.0)).all():
        raise ValueError("executed must hold 0 and 1 only")
    rates = units.mean(axis=0)
    counts = np.array(list(Counter(row.tobytes() for row in np.packbits(units.astype(bool), axis=1)).values())) / len(units)
    return RouteStatistics(
        routes=len(counts),
        gate_variance=float((rates * (1 - rates)).mean()),
        static_percent=float(100 * np.isin(rates, (0.0, 1.0)).mean()),
        # abs: a single route gives -1 * log2(1) = -0.0
        entropy_bits=abs(float(-(counts * np.log2(counts)).sum())),
    )


def below_full(clean: Any, dense: Any) -> NDArray[np.bool_]:
    """Which clean images save FLOPs at all, bool (n,)."""
    f_clean = as_numpy(clean)
    return _saves(f_clean, np.broadcast_to(as_numpy(dense), f_clean.shape))


def _saves(clean: Column, dense: Column) -> NDArray[np.bool_]:
    return np.asarray(dense - clean > RELATIVE_SLACK * dense)
