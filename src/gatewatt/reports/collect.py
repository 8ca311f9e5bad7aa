"""Find runs below folders and load them, refusing whatever does not add up.

A run is a folder with ``summary.json`` and ``records.csv`` as ``gatewatt test`` writes them. Runs that share network, dataset, defense, seed
and number of images form a panel: within one, methods are compared image by image.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np

from gatewatt.metrics.estimates import Column, recovery_percent
from gatewatt.metrics.record import SUMMARY_KEYS, ImageRecord, columns_of, merge_records, read_records

RANKING = ("GradMDM", "Power", "CGM", "Eq6", "Eq5")
"""The paper's attacks from strongest to weakest at equal MSE (Tables 4 and 9), by the names that their settings carry."""


STRENGTHS = ("gamma", "eps")
"""Settings that a sweep varies: runs that differ in nothing else are points of one line."""


class ReportError(ValueError):
    """Result files that cannot be rendered. The message is one line that names the file."""


class Attack(NamedTuple):
    """The ``attack`` entry of a summary, taken apart.

    Attributes:
        name: of the method.
        strength: the swept settings, as ("gamma", 100.0) pairs.
        settings: all others, flat and sorted.
    """

    name: str
    strength: tuple[tuple[str, float], ...]
    settings: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Run:
    """One run, rows sorted by image id.

    Attributes:
        name: folder, relative to the path it was found under.
        summary: contents of ``summary.json``.
        rows: contents of ``records.csv``.
    """

    name: str
    summary: Mapping[str, Any]
    rows: tuple[ImageRecord, ...] = field(repr=False)

    @cached_property
    def attack(self) -> Attack:
        """What attacked."""
        name, settings = _named(self.summary["attack"])
        strength = {key: value for key, value in settings.items() if key.rpartition(".")[2] in STRENGTHS and _is_number(value)}
        rest = {key: _text(value) for key, value in settings.items() if key not in strength}
        return Attack(name, tuple((key.rpartition(".")[2], float(value)) for key, value in sorted(strength.items())), tuple(sorted(rest.items())))

    @cached_property
    def flops(self) -> Column:
        """MACs per image, (n, 4): dense, clean, adversarial, adversarial after rounding to 8 bits."""
        return np.stack(columns_of(self.rows, "flops_dense", "flops_clean", "flops_adversarial", "flops_adversarial_8bit"), axis=1)

    @cached_property
    def mse(self) -> Column:
        """Squared 8-bit levels per image, (n, 2): as attacked, and after rounding to 8 bits."""
        return np.stack(columns_of(self.rows, "mse_levels2", "mse_levels2_8bit"), axis=1)

    @property
    def network(self) -> str:
        """What people call the network: the name of its weights if it has any, else the network with its settings."""
        network = self.summary["network"]
        checkpoint = network.get("checkpoint") if isinstance(network, Mapping) else None
        # The last two parts of a path tell runs/a/last from runs/b/last, without the machine's own folders.
        return "/".join(PurePath(str(checkpoint)).with_suffix("").parts[-2:]) if checkpoint else describe(network)

    @property
    def dataset(self) -> str:
        """Dataset with its settings, as one text."""
        return describe(self.summary["dataset"])

    @property
    def defense(self) -> str:
        """Defense with its settings, as one text; ``none`` without."""
        return describe(self.summary["defense"])

    @property
    def seed(self) -> str:
        """Seed of the run, as text."""
        return describe(self.summary["seed"])

    @property
    def ids(self) -> tuple[int, ...]:
        """Image ids, ascending."""
        return tuple(row.id for row in self.rows)


@dataclass(frozen=True)
class Panel:
    """Runs on the same images of the same network behind the same defense.

    Attributes:
        network: name of the network or of its weights.
        dataset: name of the dataset.
        defense: name of the defense, ``none`` without.
        seed: of the runs.
        images: number of images of every run.
        runs: by method (the paper's first, strongest first), then by strength.
    """

    network: str
    dataset: str
    defense: str
    seed: str
    images: int
    runs: tuple[Run, ...]

    @cached_property
    def labels(self) -> Mapping[str, str]:
        """Run name -> method, with those settings in brackets in which runs of one method differ."""
        by_name: dict[str, list[Run]] = defaultdict(list)
        for run in self.runs:
            by_name[run.attack.name].append(run)
        labels = {}
        for name, runs in by_name.items():
            shared = set.intersection(*(set(run.attack.settings) for run in runs))
            for run in runs:
                own = [f"{key}={value}" for key, value in run.attack.settings if (key, value) not in shared]
                labels[run.name] = f"{name} [{', '.join(own)}]" if own else name
        return labels

    @property
    def methods(self) -> dict[str, list[Run]]:
        """Method label -> its runs, in the panel's order."""
        methods: dict[str, list[Run]] = {}
        for run in self.runs:
            methods.setdefault(self.labels[run.name], []).append(run)
        return methods

    @property
    def title(self) -> str:
        """Network, dataset, defense, number of images and seed."""
        return f"{self.network} on {self.dataset}, defense {self.defense}, n = {self.images}, seed {self.seed}"


def find_runs(paths: Iterable[str | Path]) -> dict[str, Path]:
    """Folders with a summary and records below ``paths``.

    Returns:
        Unique name -> folder, sorted by name. Names are relative to the path given and start with its last part.

    Raises:
        ReportError: if a path does not exist, holds no run, or a run lacks one of its two files.
    """
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ReportError(f"{path}: no such folder")
        # Both names, so that a run that died between its two files is reported instead of left out.
        folders = {file.parent for pattern in ("summary.json", "records.csv") for file in path.rglob(pattern)}
        if not folders:
            raise ReportError(f"{path}: no run below it (a folder with summary.json and records.csv, as gatewatt test writes)")
        root = path.resolve()
        for folder in folders:
            for name in ("summary.json", "records.csv"):
                if not (folder / name).is_file():
                    raise ReportError(f"{folder}: the run is incomplete, {name} is missing; finish it or move it away")
            relative = folder.resolve().relative_to(root) if folder.resolve().is_relative_to(root) else Path(folder.name)
            found.setdefault(folder.resolve(), (Path(root.name) / relative).as_posix())
    if not found:
        raise ReportError("no paths given: name at least one folder with runs")
    runs: dict[str, Path] = {}
    for folder, name in sorted(found.items(), key=lambda item: (item[1], item[0])):
        unique, count = name, 2
        while unique in runs:
            unique, count = f"{name} ({count})", count + 1
        runs[unique] = folder
    return runs


def load_run(folder: str | Path, name: str | None = None) -> Run:
    """Load one run and check that its summary and its rows tell the same story.

    Raises:
        ReportError: on a summary that is not JSON, lacks keys, or contradicts the rows.
        RecordError: on rows that cannot be trusted (:func:`gatewatt.metrics.record.read_records`).
    """
    path = Path(folder) / "summary.json"
    try:
        summary = json.loads(path.read_bytes().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ReportError(f"{path}: not a text file (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ReportError(f"{path}: not valid JSON, {error.msg} (line {error.lineno}, column {error.colno})") from None
    if not isinstance(summary, dict):
        raise ReportError(f"{path}: must hold a mapping, got {type(summary).__name__}")
    missing = [key for key in SUMMARY_KEYS if key not in summary]
    if missing:
        raise ReportError(f"{path}: missing {'keys' if len(missing) > 1 else 'key'} {', '.join(missing)}")
    images = summary["images"]
    if not isinstance(images, int) or isinstance(images, bool) or images < 1:
        raise ReportError(f"{path}: images must be a whole number of 1 or more, got {images!r}")
    records = path.with_name("records.csv")
    try:
        found = read_records(records)
        if len(found) != images:
            raise ReportError(f"{records}: {len(found)} rows, but summary.json counts {images} images")
        # A run may attack part of a split, so gaps between ids are fine; doubles are not.
        rows = merge_records([found], {row.id for row in found})
    except ValueError as error:
        raise ReportError(str(error) if str(error).startswith(str(records)) else f"{records}: {error}") from None
    run = Run(name or Path(folder).resolve().name, summary, tuple(rows))
    _check_against_rows(path, run)
    return run


def collect(paths: Iterable[str | Path]) -> list[Run]:
    """Load every run below ``paths``, sorted by name."""
    return [load_run(folder, name) for name, folder in find_runs(paths).items()]


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Group runs into panels: same network, dataset, defense, seed and number of images; undefended before defended."""
    groups: dict[tuple[str, str, str, bool, str, str, int], list[Run]] = defaultdict(list)
    for run in runs:
        # The full description counts, the short name only sorts: two networks may share a file name.
        described = describe(run.summary["network"])
        groups[run.dataset, run.network, described, run.defense != "none", run.defense, run.seed, len(run.rows)].append(run)
    return [
        Panel(network, dataset, defense, seed, images, tuple(sorted(group, key=_order)))
        for (dataset, network, _, _, defense, seed, images), group in sorted(groups.items())
    ]


def describe(value: Any) -> str:
    """A summary entry as one text: its name, and its settings in brackets.

    Example:
        >>> describe({"name": "JPEG", "quality": 75})
        'JPEG (quality=75)'
    """
    name, settings = _named(value)
    return f"{name} ({', '.join(f'{key}={_text(item)}' for key, item in sorted(settings.items()))})" if settings else name


def _order(run: Run) -> tuple[Any, ...]:
    name = run.attack.name
    rank = RANKING.index(name) if name in RANKING else len(RANKING)
    return rank, name, run.attack.settings, run.attack.strength, run.name


def _named(value: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        return _text(value), {}
    if "class_path" in value:  # a recipe's own spelling
        return str(value["class_path"]).rpartition(".")[2], _flat(value.get("init_args") or {})
    return str(value.get("name", "unnamed")), _flat({key: item for key, item in value.items() if key != "name"})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; None means "not given" and is left out."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


def _check_against_rows(path: Path, run: Run) -> None:
    dense, clean, adversarial, _ = run.flops.T
    measured = {
        "flops_clean": float(clean.mean()),
        "flops_adversarial": float(adversarial.mean()),
        "recovery_percent": recovery_percent(clean, adversarial, dense),
        "mse_levels2": float(run.mse[:, 0].mean()),
    }
    for key, expected in measured.items():
        stated = run.summary[key]
        if stated is None and math.isnan(expected):
            continue
        if not _is_number(stated) or not math.isclose(stated, expected, rel_tol=1e-6, abs_tol=1e-6):
            raise ReportError(f"{path}: {key} is {stated!r}, but the rows of records.csv give {expected:g}: the two are not of one run")
