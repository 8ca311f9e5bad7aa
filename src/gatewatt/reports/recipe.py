"""Table recipes: which runs a table or a figure of the paper is made of, and what the paper prints beside them.

A YAML file, read as strictly as any recipe (:mod:`gatewatt.recipes`). A row says in the words of ``gatewatt test`` what is to be run: a
checkpoint, whose card gives network and data set, recipe fragments, and fields under their dotted names. Nothing is run or imported here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gatewatt.recipes import Recipe, load_recipes
from gatewatt.reports.collect import ReportError
from gatewatt.reports.measures import check_columns

PLOTS = ("none", "recovery-mse", "bars", "steps", "gates", "flops", "images")
"""What a table recipe may have drawn: recovery against MSE, recovery of each row, recovery against steps, gate usage, FLOPs of each image, and
adversarial images with their perturbation."""

NUMBERINGS = ("stated", "inferred")
SWEPT_STEPS = "times_steps"
"""The one field of a sweep that is not a recipe's: multiples of the table's steps."""
SUBSETS = ("A", "B")
"""Of the test images, as many in each as the table has, and none in both: what is chosen on A is reported on B."""

FINDINGS_FILE = "findings.yaml"
"""In a folder of results: table name -> what came out and why, in words. It is of these records alone, so it does not stand in the recipe."""

_TABLE = ("title", "claim", "numbering", "note", "columns", "plot", "strip", "images", "steps", "common", "rows")
_ROW = ("label", "checkpoint", "source", "data", "recipes", "fields", "sweep", "subsets", "times_steps", "paper")


@dataclass(frozen=True)
class Paper:
    """What the paper prints for a row.

    Attributes:
        figures: column -> number, or text such as "1.1 to 1.2".
        dataset: what the paper measured on, such as ``ImageNet``.
        network: what the paper attacked, such as ``SkipNet with HRL``; empty if the row's own label says so.
    """

    figures: Mapping[str, float | str]
    dataset: str
    network: str = ""

    def differs(self, dataset: str) -> bool:
        """Whether the paper's figures are of another data set than ``dataset``, as the data modules call it.

        Example:
            >>> Paper({}, "CIFAR-10").differs("cifar10"), Paper({}, "ImageNet").differs("cifar10")
            (False, True)
        """
        return _plain(self.dataset) != _plain(dataset)


@dataclass(frozen=True)
class Row:
    """One row: a run of ``gatewatt test``, or several if it sweeps a field.

    Attributes:
        label: what the row is called.
        checkpoint: weights under attack: a shipped name or a path.
        source: weights that the attack is crafted on, for a transfer attack.
        data: data set, where there may be no card to name it.
        recipes: fragments, such as ``attack/eq5``.
        fields: dotted field -> value, as flags of ``gatewatt test`` would set them.
        sweep: field and its values, one run each; None for a single run.
        times_steps: steps of the attack as a multiple of the table's; 0 for one that is not counted in steps.
        paper: what the paper prints, if anything that can be quoted.
        place: file and line, for errors.
        method: what the row is called on either subset; its label without one.
        subset: one of :data:`SUBSETS`, of a recipe's row that is run on both; else empty.
    """

    label: str
    checkpoint: str
    source: str | None
    data: str | None
    recipes: tuple[str, ...]
    fields: Mapping[str, Any]
    sweep: tuple[str, tuple[float, ...]] | None
    times_steps: float
    paper: Paper | None
    place: str
    method: str
    subset: str = ""

    @property
    def points(self) -> tuple[float | None, ...]:
        """Values of the sweep; (None,) without one."""
        return (None,) if self.sweep is None else self.sweep[1]


@dataclass(frozen=True)
class TableRecipe:
    """One table or figure of the paper.

    Attributes:
        path: the file.
        title: headline.
        claim: what the paper says, in one line.
        numbering: ``stated`` if our sources give the paper's number of this table, else ``inferred``.
        note: what a reader must know besides.
        columns: keys of :data:`~gatewatt.reports.measures.MEASURES`.
        plot: one of :data:`PLOTS`.
        strip: images that ``plot: images`` shows of each row.
        images: test images of every run.
        steps: iterations of the attacks.
        rows: in order; labels are unique.
    """

    path: Path
    title: str
    claim: str
    numbering: str
    note: str
    columns: tuple[str, ...]
    plot: str
    strip: int
    images: int
    steps: int
    rows: tuple[Row, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """Of the file, such as ``table04``; the files of the report are named after it."""
        return self.path.stem


def read_table(path: str | Path) -> TableRecipe:
    """Read a table recipe.

    Args:
        path: of the file, or its name among the shipped recipes, such as ``tables/table04``.

    Raises:
        RecipeError: for a file that is no recipe.
        ReportError: for a recipe that is no table, an unknown key or column, or a table that would compare at equal gamma; in one line with
            file, line and key.
        FileNotFoundError: if there is no such file.
    """
    recipe = load_recipes([path])
    settings, file = recipe.settings, recipe.files[-1]
    _check_keys(settings, _TABLE, recipe, ())
    for key, kind in {"title": str, "claim": str, "columns": list, "rows": list}.items():
        if not isinstance(settings.get(key), kind) or not settings[key]:
            raise ReportError(f"{file}: a table recipe needs {key}, {'a text' if kind is str else 'a list'}; got {settings.get(key)!r}")
    columns = tuple(map(str, settings["columns"]))
    place = str(recipe.origin("columns"))
    check_columns(columns, f"{place}: columns")
    if any(column.startswith("recovery") for column in columns) and "mse_levels2" not in columns:
        raise ReportError(f"{place}: columns: a recovery says nothing without the size of the change; add mse_levels2")
    for key, allowed in {"plot": PLOTS, "numbering": NUMBERINGS}.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise ReportError(f"{recipe.origin(key)}: {key}: must be one of {', '.join(allowed)}, got {settings[key]!r}")
    counts = {key: settings.get(key, default) for key, default in {"images": 1000, "steps": 100, "strip": 4}.items()}
    for key, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ReportError(f"{recipe.origin(key)}: {key}: must be a whole number of 1 or more, got {count!r}")
    common = settings.get("common", {})
    _check_keys(common, _ROW, recipe, ("common",))
    rows = tuple(row for index, given in enumerate(settings["rows"]) for row in _rows(common, given, recipe, index))
    labels = [row.label for row in rows]
    for row in rows:
        if labels.count(row.label) > 1:
            raise ReportError(f"{row.place}: label: {row.label!r} is the label of two rows")
    return TableRecipe(
        path=file,
        title=settings["title"],
        claim=settings["claim"],
        numbering=settings.get("numbering", "stated"),
        note=settings.get("note", ""),
        columns=columns,
        plot=settings.get("plot", "none"),
        rows=rows,
        **counts,
    )


def read_findings(results: Path, tables: Sequence[TableRecipe]) -> dict[str, str]:
    """What :data:`FINDINGS_FILE` in a folder of results says of each table; nothing if there is none.

    Args:
        results: the folder.
        tables: what is reported. The file may have findings on tables beside them too.

    Raises:
        RecipeError: for a file that cannot be read.
        ReportError: for a finding that is no text, or on a table that there is not, with file and line.
    """
    path = results / FINDINGS_FILE
    if not path.is_file():
        return {}
    recipe = load_recipes([path])
    known = {file.stem for table in tables for file in table.path.parent.glob("*.yaml")}
    for name, text in recipe.settings.items():
        place = recipe.origins[name,]
        if name not in known:
            raise ReportError(f"{place}: {name}: there is no table of that name; {_hint(name, sorted(known))}")
        if not isinstance(text, str) or not text.strip():
            raise ReportError(f"{place}: {name}: must be a text, what came out in the table of that name; got {text!r}")
    return {name: " ".join(text.split()) for name, text in recipe.settings.items()}


def _rows(common: Mapping[str, Any], given: Any, recipe: Recipe, index: int) -> list[Row]:
    """A recipe's row: as it is, or once for each subset."""
    place = str(recipe.origins["rows", str(index)])
    _check_keys(given, _ROW, recipe, ("rows", str(index)))
    merged = {**common, **given}
    for key in ("fields", "paper"):
        merged[key] = {**common.get(key, {}), **given.get(key, {})}
    for key in ("label", "checkpoint"):
        if not isinstance(merged.get(key), str):
            raise ReportError(f"{place}: a row needs {key}, a text; got {merged.get(key)!r}")
    sweep = merged.get("sweep")
    if sweep is not None and (not isinstance(sweep, dict) or len(sweep) != 1 or not isinstance(next(iter(sweep.values())), list)):
        raise ReportError(f"{place}: sweep: must be one field with a list of values, got {sweep!r}")
    if not isinstance(merged.get("subsets", False), bool):
        raise ReportError(f"{place}: subsets: must be true or false, got {merged['subsets']!r}")
    row = Row(
        label=merged["label"],
        checkpoint=merged["checkpoint"],
        source=merged.get("source"),
        data=merged.get("data"),
        # What all rows have in common comes first, so that a row's own recipe has the last word.
        recipes=(*common.get("recipes", ()), *given.get("recipes", ())),
        fields=merged["fields"],
        sweep=None if sweep is None else next((name, tuple(values)) for name, values in sweep.items()),
        times_steps=merged.get("times_steps", 1),
        # A data set or a network alone, said of all rows, is no figure.
        paper=_paper(merged["paper"], place) if set(merged["paper"]) - {"dataset", "network"} else None,
        place=place,
        method=merged["label"],
    )
    return [replace(row, label=f"{row.label}, subset {subset}", subset=subset) for subset in SUBSETS] if merged.get("subsets") else [row]


def _paper(given: Mapping[str, Any], place: str) -> Paper:
    figures = {key: value for key, value in given.items() if key not in ("dataset", "network")}
    check_columns(figures, f"{place}: paper")
    if not isinstance(given.get("dataset"), str):
        raise ReportError(f"{place}: paper: needs dataset, what the paper's figures were measured on")
    return Paper(figures, given["dataset"], given.get("network", ""))


def _check_keys(given: Any, allowed: tuple[str, ...], recipe: Recipe, key: tuple[str, ...]) -> None:
    if not isinstance(given, dict):
        raise ReportError(f"{recipe.origins[key]}: {'.'.join(key)}: must be a mapping, got {given!r}")
    for name in given:
        if name not in allowed:
            where = (*key, name)
            raise ReportError(f"{recipe.origins[where]}: {'.'.join(where)}: there is no such key in a table recipe; {_hint(name, allowed)}")


def _hint(name: str, allowed: Sequence[str]) -> str:
    """What may have been meant."""
    near = get_close_matches(name, allowed, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(allowed)}"


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())
