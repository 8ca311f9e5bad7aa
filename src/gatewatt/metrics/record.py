"""One row per attacked image, and the summary of a run.

Every table and every figure is a group-by of these rows, so they are checked when made, when written and when read. numpy and the standard
library only: the reports read result files on machines without torch.

``records.csv`` has one line per image with the columns of :class:`ImageRecord`; ``summary.json`` has the keys of :func:`summarize`.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gatewatt.files import write_new
from gatewatt.metrics.estimates import (
    Column,
    as_numpy,
    bootstrap_interval,
    recovery_per_image_percent,
    recovery_percent,
    route_statistics,
)
from gatewatt.rounding import RELATIVE_SLACK

MAX_GATE_STRING = 256
"""Networks with more units than this (spatial and token halting have thousands) leave the gate columns of their rows empty."""

SUMMARY_KEYS = (
    "network",
    "dataset",
    "images",
    "attack",
    "defense",
    "seed",
    "accuracy_clean",
    "accuracy_adversarial",
    "flops_dense",
    "flops_clean",
    "flops_adversarial",
    "flops_adversarial_p95",
    "recovery_percent",
    "recovery_per_image_percent",
    "images_at_full_flops",
    "mse_levels2",
    "psnr_db",
    "linf_levels",
    "recovery_8bit_percent",
    "flops_adversarial_8bit",
    "images_per_second",
    "wall_seconds",
    "versions",
    "recipe",
)
"""The keys that every summary has; :func:`summarize` adds more."""


class RecordError(ValueError):
    """A row, or a file of rows, that cannot be trusted. The message is one line that names the file, the line and the column."""


@dataclass(frozen=True)
class ImageRecord:
    """What one attack did to one image.

    Attributes:
        id: position of the image in its split.
        label: true class.
        prediction_clean: predicted class of the clean image.
        prediction_adversarial: predicted class of the adversarial image.
        prediction_adversarial_8bit: the same after rounding the adversarial image to 8 bits.
        flops_dense: MACs with every gate open.
        flops_clean: MACs spent on the clean image.
        flops_adversarial: MACs spent on the adversarial image.
        flops_adversarial_8bit: the same after rounding the adversarial image to 8 bits.
        mse_levels2: mean squared error between adversarial and clean image, in squared 8-bit levels (0..255 scale).
        psnr_db: ``10 log10(255^2 / mse_levels2)``; infinite where nothing changed.
        linf_levels: largest change of a pixel, in 8-bit levels.
        mse_levels2_8bit: ``mse_levels2`` after rounding the adversarial image to 8 bits.
        psnr_db_8bit: ``psnr_db`` after rounding the adversarial image to 8 bits.
        gates_clean: executed units of the clean image in the order of ``gate_table``, such as ``"0110"``; empty for a network with more
            than :data:`MAX_GATE_STRING` units.
        gates_adversarial: the same for the adversarial image.

    Raises:
        RecordError: on a number that is not finite, FLOPs above dense, a PSNR that contradicts its MSE (wrong units, most often), or a
            gate string with anything but 0 and 1.
    """

    id: int
    label: int
    prediction_clean: int
    prediction_adversarial: int
    prediction_adversarial_8bit: int
    flops_dense: float
    flops_clean: float
    flops_adversarial: float
    flops_adversarial_8bit: float
    mse_levels2: float
    psnr_db: float
    linf_levels: float
    mse_levels2_8bit: float
    psnr_db_8bit: float
    gates_clean: str
    gates_adversarial: str

    def __post_init__(self) -> None:
        if self.id < 0:
            raise RecordError(f"column 'id': must be 0 or more, got {self.id}")
        for column in _FLOPS:
            value = getattr(self, column)
            # A comparison with NaN is false, so this catches NaN, infinity and excess together.
            if not (0 <= value <= self.flops_dense * (1 + RELATIVE_SLACK) and math.isfinite(value)):
                raise RecordError(f"column {column!r}: must be finite, 0 or more and at most flops_dense ({self.flops_dense:g}), got {value:g}")
        for column in ("mse_levels2", "linf_levels", "mse_levels2_8bit"):
            value = getattr(self, column)
            if not 0 <= value < math.inf:
                raise RecordError(f"column {column!r}: must be finite and 0 or more, got {value:g}")
        for column, mse in (("psnr_db", self.mse_levels2), ("psnr_db_8bit", self.mse_levels2_8bit)):
            value, expected = getattr(self, column), psnr_of_mse(mse)
            if not (value == expected or abs(value - expected) < 0.01):
                raise RecordError(f"column {column!r}: {value:g} dB contradicts an MSE of {mse:g} squared levels ({expected:g} dB)")
        for column in ("gates_clean", "gates_adversarial"):
            value = getattr(self, column)
            if value.strip("01"):
                raise RecordError(f"column {column!r}: must hold 0 and 1 only, got {value!r}")
        if len(self.gates_clean) != len(self.gates_adversarial):
            raise RecordError(f"column 'gates_adversarial': {len(self.gates_adversarial)} units, gates_clean has {len(self.gates_clean)}")


_FLOPS = ("flops_dense", "flops_clean", "flops_adversarial", "flops_adversarial_8bit")
_PARSERS = {"int": int, "float": float, "str": str}
_EXPECTED = {"int": "a whole number", "float": "a number", "str": "text"}
# With postponed annotations a field's type is its name.
_COLUMNS = {field.name: str(field.type) for field in fields(ImageRecord)}


def psnr_of_mse(mse: float) -> float:
    """PSNR in dB (MAX = 255) of a mean squared error in squared 8-bit levels; infinite at 0.

    Example:
        >>> round(psnr_of_mse(0.11), 1)
        57.7
    """
    return 20 * math.log10(255) - 10 * math.log10(mse) if mse > 0 else math.inf


def gate_strings(executed: Any) -> list[str]:
    """Executed units (B, N) of 0 and 1 as one string per image; empty strings if N exceeds :data:`MAX_GATE_STRING`.

    Example:
        >>> gate_strings([[0.0, 1.0], [1.0, 1.0]])
        ['01', '11']
    """
    units = as_numpy(executed)
    if units.ndim != 2 or not np.isin(units, (0.0, 1.0)).all():
        raise ValueError(f"executed must hold 0 and 1 only and have shape (B, N), got shape {units.shape}")
    if units.shape[1] > MAX_GATE_STRING:
        return [""] * len(units)
    return ["".join(row) for row in np.where(units == 1, "1", "0").tolist()]


def image_records(
    *,
    ids: Any,
    labels: Any,
    prediction_clean: Any,
    prediction_adversarial: Any,
    prediction_adversarial_8bit: Any,
    flops_dense: Any,
    flops_clean: Any,
    flops_adversarial: Any,
    flops_adversarial_8bit: Any,
    mse_levels2: Any,
    linf_levels: Any,
    mse_levels2_8bit: Any,
    executed_clean: Any,
    executed_adversarial: Any,
) -> list[ImageRecord]:
    """Rows of a batch.

    Args:
        ids: positions in the split, (B,). This and all other columns may be torch tensors on any device, arrays or lists.
        labels: true classes, (B,).
        prediction_clean: predicted classes, (B,).
        prediction_adversarial: predicted classes, (B,).
        prediction_adversarial_8bit: predicted classes, (B,).
        flops_dense: MACs, (B,) or one number.
        flops_clean: MACs, (B,).
        flops_adversarial: MACs, (B,).
        flops_adversarial_8bit: MACs, (B,).
        mse_levels2: squared 8-bit levels, (B,); the PSNR is computed from it.
        linf_levels: 8-bit levels, (B,).
        mse_levels2_8bit: squared 8-bit levels, (B,).
        executed_clean: 0 or 1, (B, N).
        executed_adversarial: 0 or 1, (B, N).

    Raises:
        RecordError: on a value that no row may have, naming the image.
        ValueError: on columns of different lengths.
    """
    columns: dict[str, Any] = {
        "id": ids,
        "label": labels,
        "prediction_clean": prediction_clean,
        "prediction_adversarial": prediction_adversarial,
        "prediction_adversarial_8bit": prediction_adversarial_8bit,
        "flops_dense": flops_dense,
        "flops_clean": flops_clean,
        "flops_adversarial": flops_adversarial,
        "flops_adversarial_8bit": flops_adversarial_8bit,
        "mse_levels2": mse_levels2,
        "linf_levels": linf_levels,
        "mse_levels2_8bit": mse_levels2_8bit,
    }
    count = len(ids)
    arrays = {name: as_numpy(values) for name, values in columns.items()}
    arrays["flops_dense"] = np.broadcast_to(arrays["flops_dense"], (count,))
    gates_clean, gates_adversarial = gate_strings(executed_clean), gate_strings(executed_adversarial)
    lengths = {name: values.shape for name, values in arrays.items()} | {
        "executed_clean": (len(gates_clean),),
        "executed_adversarial": (len(gates_adversarial),),
    }
    for name, shape in lengths.items():
        if shape != (count,):
            raise ValueError(f"{name} must have one entry per image ({count}), got shape {shape}")
    rows = []
    for index in range(count):
        cells: dict[str, Any] = {name: _PARSERS[_COLUMNS[name]](values[index]) for name, values in arrays.items()}
        cells["psnr_db"] = psnr_of_mse(cells["mse_levels2"]) if cells["mse_levels2"] >= 0 else math.nan
        cells["psnr_db_8bit"] = psnr_of_mse(cells["mse_levels2_8bit"]) if cells["mse_levels2_8bit"] >= 0 else math.nan
        try:
            rows.append(ImageRecord(**cells, gates_clean=gates_clean[index], gates_adversarial=gates_adversarial[index]))
        except RecordError as error:
            raise RecordError(f"image {cells['id']}, {error}") from None
    return rows


def write_records(path: str | Path, rows: Iterable[ImageRecord]) -> Path:
    """Write rows as CSV in one step; numbers are written so that reading gives them back to the last bit.

    Raises:
        FileExistsError: a measured result is never overwritten.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    # Through the parser, so that a numpy or torch scalar in a row is written as the number that reading gives back.
    writer.writerows([_PARSERS[kind](getattr(row, name)) for name, kind in _COLUMNS.items()] for row in rows)
    return write_new(path, text.getvalue())


def read_records(path: str | Path) -> list[ImageRecord]:
    """Read and check the rows of one file, in the file's order.

    Raises:
        RecordError: naming file, line and column of the first fault: not text, cut off, columns missing or unknown, a cell that is not
            a number, or whatever :class:`ImageRecord` refuses.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError(f"{path}: not a text file (byte {error.start})") from None
    if not text.endswith("\n"):
        raise RecordError(f"{path}, line {text.count(chr(10)) + 1}: cut off, the file does not end with a newline")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[ImageRecord] = []
    try:
        header = next(reader)
        if header != list(_COLUMNS):
            raise RecordError(f"{path}, line 1: {_header_fault(header)}")
        for cells in reader:
            rows.append(_parse(cells, where=f"{path}, line {reader.line_num}"))
            if len(rows[-1].gates_clean) != len(rows[0].gates_clean):
                raise RecordError(
                    f"{path}, line {reader.line_num}, column 'gates_clean': {len(rows[-1].gates_clean)} units, line 2 has {len(rows[0].gates_clean)}"
                )
    except csv.Error as error:
        raise RecordError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def merge_records(parts: Iterable[Sequence[ImageRecord]], expected: int | Iterable[int]) -> list[ImageRecord]:
    """Put the rows of several processes together, sorted by image id.

    Args:
        parts: rows of each process, in any order.
        expected: number N of images, whose ids must be exactly 0..N-1; or the ids themselves, for a subset of a split.

    Raises:
        RecordError: if an id is missing, doubled or not expected.
    """
    rows = sorted(chain.from_iterable(parts), key=lambda row: row.id)
    ids = [row.id for row in rows]
    wanted = sorted(range(expected) if isinstance(expected, int) else expected)
    if ids != wanted:
        faults = {
            "missing": sorted(set(wanted) - set(ids)),
            "doubled": sorted({first for first, second in pairwise(ids) if first == second}),
            "not expected": sorted(set(ids) - set(wanted)),
        }
        named = "; ".join(f"{what} {_few(images)}" for what, images in faults.items() if images)
        raise RecordError(f"{len(rows)} rows for {len(wanted)} images: {named}")
    return rows


def columns_of(rows: Sequence[ImageRecord], *names: str) -> list[Column]:
    """The named number columns of ``rows`` as float64 arrays (n,)."""
    return [np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in names]


def summarize(
    rows: Sequence[ImageRecord],
    *,
    network: Any,
    dataset: Any,
    attack: Any,
    defense: Any,
    seed: int | None,
    wall_seconds: float,
    versions: Mapping[str, str],
    recipe: Any,
) -> dict[str, Any]:
    """The figures of a run.

    Args:
        rows: one per attacked image; the order does not matter.
        network: name, or a mapping with ``name`` and settings.
        dataset: name, or a mapping with ``name`` and settings.
        attack: ``{"name": "GradMDM", "gamma": 100.0, ...}``; the reports draw one line per name over ``gamma`` (or ``eps``).
        defense: name, mapping with ``name`` and settings, or None.
        seed: of the run.
        wall_seconds: time of the attack over all images.
        versions: package -> version.
        recipe: the recipe that ran.

    Returns:
        The keys of :data:`SUMMARY_KEYS` and more. FLOPs are means per image in MACs; ``accuracy_*`` are fractions in [0, 1]; ``*_percent``
        are percent; ``mse_levels2*`` are means in squared 8-bit levels; ``psnr_db`` is the mean over changed images (``images_unchanged``
        counts the others), ``psnr_db_of_mean_mse`` the PSNR of the mean MSE; ``linf_levels`` is a mean; ``recovery_percent_interval`` is a
        95 % bootstrap interval over images. What is undefined is NaN here and null in the file.

    Raises:
        RecordError: if there are no rows.
    """
    if not rows:
        raise RecordError("no rows to summarize: the run attacked no image")
    rows = sorted(rows, key=lambda row: row.id)
    dense, clean, adversarial, adversarial_8bit = columns_of(rows, *_FLOPS)
    mse, linf, mse_8bit = columns_of(rows, "mse_levels2", "linf_levels", "mse_levels2_8bit")
    per_image = recovery_per_image_percent(clean, adversarial, dense)
    psnr = np.array([row.psnr_db for row in rows])
    changed = psnr[np.isfinite(psnr)]
    p95, p99 = np.percentile(adversarial, [95, 99])
    return {
        "network": network,
        "dataset": dataset,
        "images": len(rows),
        "attack": attack,
        "defense": defense,
        "seed": seed,
        "accuracy_clean": _share(row.prediction_clean == row.label for row in rows),
        "accuracy_adversarial": _share(row.prediction_adversarial == row.label for row in rows),
        "accuracy_adversarial_8bit": _share(row.prediction_adversarial_8bit == row.label for row in rows),
        "flops_dense": float(dense.mean()),
        "flops_clean": float(clean.mean()),
        "flops_clean_std": float(clean.std()),
        "flops_adversarial": float(adversarial.mean()),
        "flops_adversarial_p95": float(p95),
        "flops_adversarial_p99": float(p99),
        "flops_adversarial_max": float(adversarial.max()),
        "flops_adversarial_8bit": float(adversarial_8bit.mean()),
        "recovery_percent": recovery_percent(clean, adversarial, dense),
        "recovery_percent_interval": list(bootstrap_interval(clean, adversarial, dense)),
        "recovery_per_image_percent": per_image.percent,
        "images_at_full_flops": per_image.left_out,
        # The same count under the name that says what it does to the per-image mean.
        "images_left_out": per_image.left_out,
        "recovery_8bit_percent": recovery_percent(clean, adversarial_8bit, dense),
        "mse_levels2": float(mse.mean()),
        "psnr_db": float(changed.mean()) if len(changed) else math.nan,
        "psnr_db_of_mean_mse": psnr_of_mse(float(mse.mean())),
        "images_unchanged": len(psnr) - len(changed),
        "linf_levels": float(linf.mean()),
        "mse_levels2_8bit": float(mse_8bit.mean()),
        "psnr_db_8bit_of_mean_mse": psnr_of_mse(float(mse_8bit.mean())),
        **_route_keys("clean", [row.gates_clean for row in rows]),
        **_route_keys("adversarial", [row.gates_adversarial for row in rows]),
        "images_per_second": len(rows) / wall_seconds if wall_seconds > 0 else math.nan,
        "wall_seconds": float(wall_seconds),
        "versions": dict(versions),
        "recipe": recipe,
    }


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> Path:
    """Write a summary as JSON in one step; NaN and infinity, which JSON lacks, become null.

    Raises:
        FileExistsError: a measured result is never overwritten.
        TypeError: on a value that JSON cannot hold.
    """
    return write_new(path, json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n")


def _route_keys(which: str, gates: list[str]) -> dict[str, Any]:
    if not gates[0]:
        return {f"routes_{which}": None, f"gates_static_{which}_percent": None}
    statistics = route_statistics([[int(unit) for unit in row] for row in gates])
    return {f"routes_{which}": statistics.routes, f"gates_static_{which}_percent": statistics.static_percent}


def _share(facts: Iterable[bool]) -> float:
    listed = list(facts)
    return sum(listed) / len(listed)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.as_posix() if isinstance(value, Path) else value


def _header_fault(header: list[str]) -> str:
    missing, unknown = [name for name in _COLUMNS if name not in header], [name for name in header if name not in _COLUMNS]
    if missing:
        return f"column {missing[0]!r} is missing"
    if unknown:
        return f"column {unknown[0]!r} is unknown"
    return f"columns must be in this order: {', '.join(_COLUMNS)}"


def _parse(cells: list[str], where: str) -> ImageRecord:
    if len(cells) != len(_COLUMNS):
        raise RecordError(f"{where}: {len(cells)} cells, expected {len(_COLUMNS)}")
    values: dict[str, Any] = {}
    for (name, kind), cell in zip(_COLUMNS.items(), cells, strict=True):
        try:
            values[name] = _PARSERS[kind](cell)
        except ValueError:
            raise RecordError(f"{where}, column {name!r}: expected {_EXPECTED[kind]}, got {cell!r}") from None
    try:
        return ImageRecord(**values)
    except RecordError as error:
        raise RecordError(f"{where}, {error}") from None


def _few(images: list[int]) -> str:
    return ", ".join(map(str, images[:5])) + (f" and {len(images) - 5} more" if len(images) > 5 else "")
