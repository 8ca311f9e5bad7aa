"""Synthetic runs with a known answer, for the tests of reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gatewatt.metrics.record import image_records, summarize, write_records, write_summary

DENSE = 1e6
SLOPE = 8.0
"""Recovery in points per unit of log MSE, the same for every method: lines in log MSE are parallel, so offsets are the answer."""
GAMMAS = (0.01, 0.1, 1.0, 10.0)
MSE_OF_GAMMA = {0.01: 300.0, 0.1: 30.0, 1.0: 3.0, 10.0: 0.3}


def write_run(
    folder: Path,
    *,
    method: str = "GradMDM",
    gamma: float = 1.0,
    offset: float = 20.0,
    mse: float | None = None,
    images: int = 200,
    shift_8bit: float = -1.0,
    clean_seed: int = 0,
    ids: Any = None,
    noise: float = 2.0,
    settings: dict[str, Any] | None = None,
    **names: Any,
) -> Path:
    """Write one run whose recovery is ``offset + SLOPE * log(MSE)`` percent, up to noise that every method shares image by image."""
    generator = np.random.default_rng(clean_seed)
    clean = DENSE * generator.uniform(0.4, 0.7, images)
    scatter = generator.normal(0, noise, images)
    labels = generator.integers(0, 10, images)
    mean_mse = MSE_OF_GAMMA[gamma] if mse is None else mse
    spread = generator.uniform(0.9, 1.1, images)
    image_mse = mean_mse * spread / spread.mean()
    saved = DENSE - clean

    def attacked(points: float) -> np.ndarray:
        # Centred by saving, so that the ratio of sums is exact.
        centred = scatter - (scatter * saved).sum() / saved.sum()
        return clean + saved * (points + centred) / 100

    recovery = offset + SLOPE * np.log(mean_mse) if mean_mse else 0.0
    flops = attacked(recovery) if mean_mse else clean
    rows = image_records(
        ids=np.arange(images) if ids is None else ids,
        labels=labels,
        prediction_clean=np.where(np.arange(images) % 10 == 0, labels + 1, labels),
        prediction_adversarial=np.where(np.arange(images) % 2 == 0, labels + 1, labels),
        prediction_adversarial_8bit=labels,
        flops_dense=DENSE,
        flops_clean=clean,
        flops_adversarial=flops,
        flops_adversarial_8bit=attacked(recovery + shift_8bit) if mean_mse else clean,
        mse_levels2=image_mse,
        linf_levels=np.sqrt(image_mse),
        mse_levels2_8bit=image_mse + (0.083 if mean_mse else 0),
        executed_clean=(np.arange(images)[:, None] >> np.arange(4)) & 1,
        executed_adversarial=np.ones((images, 4)),
    )
    entries: dict[str, Any] = {
        "network": "SkipNet-38",
        "dataset": "digits",
        "defense": None,
        "seed": 0,
        "wall_seconds": 4.0,
        "versions": {"gatewatt": "0.1"},
        "recipe": None,
        "attack": {"name": method, "gamma": gamma, "steps": 100, **(settings or {})},
    }
    write_records(folder / "records.csv", rows)
    write_summary(folder / "summary.json", summarize(rows, **(entries | names)))
    return folder


def write_sweep(folder: Path, offsets: dict[str, float], **names: Any) -> Path:
    """Write runs of every method over :data:`GAMMAS`."""
    for method, offset in offsets.items():
        for gamma in GAMMAS:
            write_run(folder / f"{method}-{gamma}", method=method, gamma=gamma, offset=offset, **names)
    return folder
