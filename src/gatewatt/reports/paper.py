"""Tables and figures of the paper, ours and the paper's figures side by side, from records alone.

A table shows every run with its interval and the size of its change. Methods are compared at equal MSE, where their rows sweep a setting
(:mod:`gatewatt.reports.matched`); the table of runs itself compares nothing that was attacked with different strength.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gatewatt.files import write_text
from gatewatt.reports.collect import Panel, ReportError, Run, panels
from gatewatt.reports.figures import recovery_figure
from gatewatt.reports.matched import match
from gatewatt.reports.measures import DRAWS, MEASURES, SEED, Measured, measure, measured_text
from gatewatt.reports.plots import Bar, Curve, bars, costs, curves, images, usage
from gatewatt.reports.recipe import SUBSETS, SWEPT_STEPS, Row, TableRecipe
from gatewatt.reports.render import CONVENTIONS, FORMATS, attacks_text, versions_text
from gatewatt.reports.subsets import Pair, choices_table, choose
from gatewatt.reports.tables import Format, Table, csv_text, figures_of, matched_table, orderings_table, orderings_text

UNITS = (
    "In which unit the paper's MSE is, what was published does not decide: 8-bit levels, as its text has it, or standardised pixels, as its authors' "
    "release prints them. Its PSNR is 10 log10(255^2 / MSE) of the same figure and decides nothing. Ours stands beside it in the first unit and, as "
    '"MSE, standardised", in the second (levels divided by 255 and by the deviations of the data\'s channels), where 0.11 is a true PSNR of '
    "22 to 24 dB and not 57.7. Neither is claimed to be the paper's."
)
INFERRED = "That the paper has this, or has it under this number, is inferred; our sources do not say so."
HALVES = (
    "Subsets A and B are as many test images each, drawn with a fixed seed, and have none in common. Every setting is run on both; what is chosen "
    "looks at A alone. How the paper divides its images our sources do not say."
)
NO_FIGURES = "Our sources quote no figure of the paper for it, so none stands beside ours."


@dataclass(frozen=True)
class Line:
    """One line of a table: a run, or why there is none.

    Attributes:
        label: of the row and the point of its sweep; unique in the table.
        row: what the line belongs to.
        point: value of the row's sweep.
        key: under which the run's records lie; empty if it could not be told.
        run: the run, named by the label.
        strip: the row's images, if the table shows some.
        reason: why there is no run.
        older: whether the records were measured by code that has changed since.
    """

    label: str
    row: Row
    point: float | None = None
    key: str = ""
    run: Run | None = None
    strip: Path | None = None
    reason: str = ""
    older: bool = False


class Section(NamedTuple):
    """A rendered table.

    Attributes:
        markdown: its text.
        files: CSV and figures.
    """

    markdown: str
    files: list[Path]


@dataclass(frozen=True)
class RowPanel(Panel):
    """A panel whose methods are called by the labels of the table's rows.

    Attributes:
        names: run name -> what its row is called on either subset.
        subset: of the test images; empty for rows that have none.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    subset: str = ""

    @property
    def labels(self) -> Mapping[str, str]:
        """Run name -> row."""
        return self.names

    @property
    def title(self) -> str:
        """As that of any panel, and the subset."""
        return super().title + (f", subset {self.subset}" if self.subset else "")


def render_table(
    table: TableRecipe, lines: Sequence[Line], out: Path, *, finding: str = "", figures: bool = True, formats: Sequence[str] = ("png",)
) -> Section:
    """Render one table into ``out``.

    Args:
        table: the recipe.
        lines: its lines, in order.
        out: folder for CSV and figures.
        finding: what came out and why, in words; stands below what the paper says.
        figures: whether to draw; needs matplotlib.
        formats: suffixes of the figures, ``png`` or ``svg``.

    Returns:
        Markdown text and the files written.
    """
    for suffix in formats:
        if suffix not in FORMATS:
            raise ReportError(f"formats must be among {', '.join(FORMATS)}, got {suffix!r}")
    measured = {line.label: measure(line.run, table.columns) for line in lines if line.run is not None}
    files = [write_text(out / f"{table.name}.csv", lines_csv(table, lines, measured))]
    pictures = draw(table, lines, measured, out, formats) if figures and measured else []
    text = [f"## {table.title}\n", f"The paper: {table.claim}\n", *([f"Here: {finding}\n"] if finding else [])]
    text += ["".join(f"- {fact}\n" for fact in facts(table, lines))]
    # One picture of each is enough to read; the other formats lie beside it.
    text += [f"![{table.title}]({path.name})\n" for path in pictures if path.suffix == f".{formats[0]}"]
    text.append(lines_table(table, lines, measured).markdown())
    text += [*chosen_section(lines), *matched_sections(lines)]
    return Section("\n".join(text), files + pictures)


def render_page(title: str, sections: Sequence[Section]) -> str:
    """One page of several tables: what the units are, once, then every table."""
    return "\n".join([f"# {title}\n", CONVENTIONS, *(section.markdown for section in sections)])


def facts(table: TableRecipe, lines: Sequence[Line]) -> list[str]:
    """What a reader must know of a table: images, seed, attacks, units, intervals, and where the paper's figures are from."""
    runs = [line.run for line in lines if line.run is not None]
    told = [table.note.strip()] if table.note else []
    if runs:
        counts = sorted({len(run.rows) for run in runs})
        seeds = sorted({run.seed for run in runs})
        told.append(f"n = {' or '.join(map(str, counts))} test images a run, seed {' and '.join(seeds)}.")
        told.append(attacks_text(runs, f"{table.name}.csv").strip())
        told.append(
            f"Means over images with 95 % bootstrap intervals in brackets ({DRAWS} resamples); recovery is the ratio of sums; "
            "MSE in squared 8-bit levels, PSNR with MAX = 255; 1 FLOP = 1 MAC."
        )
        told.append(versions_text(runs))
    if any(line.row.subset for line in lines):
        told.append(HALVES)
    if older := sum(line.older for line in lines):
        told.append(f"{older} of {len(runs)} runs were measured by code that has changed since.")
    missing = sum(line.run is None for line in lines)
    if missing:
        told.append(f"{missing} of {len(lines)} runs have no records; the remark says why.")
    quoted = [line.row.paper for line in lines if line.row.paper is not None]
    if not quoted:
        told.append(NO_FIGURES)
    elif any({"mse_levels2", "psnr_db"} & set(paper.figures) for paper in quoted):
        told.append(UNITS)
    return told + ([INFERRED] if table.numbering == "inferred" else [])


def lines_table(table: TableRecipe, lines: Sequence[Line], measured: Mapping[str, Mapping[str, Measured]]) -> Table:
    """Every line with its figures, the paper's beside them."""
    quoted = [key for key in MEASURES if any(line.row.paper is not None and key in line.row.paper.figures for line in lines)]
    network = any(line.row.paper is not None and line.row.paper.network for line in lines)
    remark = any(line.run is None for line in lines)
    headers = ["row", "data", "n", *(MEASURES[key].header for key in table.columns), *(f"paper: {MEASURES[key].header}" for key in quoted)]
    headers += ["paper: network"] * network + ["remark"] * remark
    rows = []
    for line in lines:
        own = measured.get(line.label)
        cells = [line.label, *((line.run.dataset, str(len(line.run.rows))) if line.run else ("-", "-"))]
        cells += [measured_text(key, own[key]) if own else "-" for key in table.columns]
        cells += [paper_text(line, key, lines) for key in quoted]
        cells += [line.row.paper.network if line.row.paper and quotes(line, lines) else "-"] * network
        cells += [f"not run: {line.reason}" if line.run is None else "-"] * remark
        rows.append(tuple(cells))
    columns: dict[str, Format] = dict.fromkeys(headers, str)
    return Table(columns, tuple(rows))


def quotes(line: Line, lines: Sequence[Line]) -> bool:
    """Whether a line is the one that shows its row's figures of the paper: the first of a sweep, since none of its points is the paper's."""
    return next(other.label for other in lines if other.row is line.row) == line.label


def paper_text(line: Line, column: str, lines: Sequence[Line]) -> str:
    """The paper's figure in a cell, marked where it is of another data set than the line."""
    paper = line.row.paper
    if paper is None or column not in paper.figures or not quotes(line, lines):
        return "-"
    figure = paper.figures[column]
    text = figure if isinstance(figure, str) else f"{figure:g}"
    return f"{text} (paper: {paper.dataset})" if line.run is None or paper.differs(line.run.dataset) else text


def lines_csv(table: TableRecipe, lines: Sequence[Line], measured: Mapping[str, Mapping[str, Measured]]) -> str:
    """Every line with its figures and the ends of their intervals, and the paper's figures."""
    quoted = [key for key in MEASURES if any(line.row.paper is not None and key in line.row.paper.figures for line in lines)]
    header = ["table", "row", "point", "label", "status", "key", "network", "dataset", "defense", "seed", "images", "attack", "settings"]
    header += [f"{key}{end}" for key in table.columns for end in ("", "_low", "_high")]
    header += [f"paper_{key}" for key in quoted] + ["paper_dataset", "paper_network"]
    rows: list[list[Any]] = []
    for line in lines:
        run, own, paper = line.run, measured.get(line.label), line.row.paper
        place: list[Any] = [None] * 7
        if run is not None:
            settings = "; ".join(f"{key}={value:g}" for key, value in run.attack.strength) + "; ".join(["", *map("=".join, run.attack.settings)])
            place = [run.network, run.dataset, run.defense, run.seed, len(run.rows), run.attack.name, settings.removeprefix("; ")]
        cells = [table.name, line.row.label, line.point, line.label, "measured" if run else f"not run: {line.reason}", line.key, *place]
        cells += [number for key in table.columns for number in (own[key] if own else (None, None, None))]
        cells += [paper.figures.get(key) if paper else None for key in quoted] + ([paper.dataset, paper.network] if paper else [None, None])
        rows.append(cells)
    return csv_text(header, rows)


def row_panels(lines: Sequence[Line]) -> list[RowPanel]:
    """The measured lines by subset, network, data set, defense, seed and number of images, their methods named as the rows are."""
    found = []
    for subset in dict.fromkeys(line.row.subset for line in lines):
        rows = {line.run.name: line for line in lines if line.run is not None and line.row.subset == subset}
        for panel in panels([line.run for line in rows.values() if line.run is not None]):
            names = {run.name: rows[run.name].row.method for run in panel.runs}
            found.append(RowPanel(panel.network, panel.dataset, panel.defense, panel.seed, panel.images, panel.runs, names, subset))
    return found


def chosen_section(lines: Sequence[Line]) -> list[str]:
    """What settings chosen on subset A reach on subset B, for the rows that have both."""
    runs = {(line.row.method, line.point, line.row.subset): line.run for line in lines if line.run is not None}
    pairs: dict[str, list[Pair]] = {}
    for (method, point, subset), run in runs.items():
        if subset == SUBSETS[0] and (other := runs.get((method, point, SUBSETS[1]))) is not None:
            pairs.setdefault(method, []).append(Pair(run, other))
    if not pairs:
        return []
    words = "The setting of largest recovery on A within an MSE, and what it does on B, each with its 95 % interval:\n"
    return ["### Chosen on subset A, reported on subset B\n", words, choices_table(choose(pairs)).markdown()]


def matched_sections(lines: Sequence[Line]) -> list[str]:
    """Recovery at equal MSE of the rows that sweep a setting, for float and for 8-bit images."""
    text = []
    # Runs of different numbers of steps lie on no line over MSE.
    for panel in row_panels([line for line in lines if line.row.sweep is not None and line.row.sweep[0] != SWEPT_STEPS]):
        if len(panel.methods) < 2:
            continue
        for image, words in (("float", "float images"), ("8bit", "8-bit images")):
            matched = match(panel, image=image, draws=DRAWS, seed=SEED)  # type: ignore[arg-type]
            text.append(f"### At equal MSE, {words}: {panel.title}\n")
            if matched.points:
                text += ["Recovery % with its 95 % interval:\n", matched_table(matched).markdown()]
            if matched.orderings:
                text += ["The paper's ordering, with the difference in points:\n", orderings_table(matched).markdown(), orderings_text(matched)]
            if matched.notes:
                text.append("".join(f"- {note[0].upper()}{note[1:]}.\n" for note in matched.notes))
    return text


def draw(table: TableRecipe, lines: Sequence[Line], measured: Mapping[str, Mapping[str, Measured]], out: Path, formats: Sequence[str]) -> list[Path]:
    """Draw what the table asks for, in every format; nothing where the records hold nothing to draw."""
    runs = {line.label: line.run for line in lines if line.run is not None}
    written: list[Path] = []
    for suffix in formats:
        path = out / f"{table.name}.{suffix}"
        if table.plot == "recovery-mse":
            for panel in row_panels(lines):
                slug = re.sub(r"[^a-z0-9]+", "-", f"{panel.network} {panel.defense} {panel.subset}".lower()).strip("-")
                figures = {run.name: figures_of(run, draws=DRAWS, seed=SEED) for run in panel.runs}
                written.append(recovery_figure(panel, figures, out / f"{table.name}-{slug}.{suffix}"))
        elif table.plot == "bars":
            written.append(bars([bar_of(line, measured[line.label]["recovery_percent"], lines) for line in lines if line.run], path))
        elif table.plot == "steps":
            written.append(curves(curves_of(lines, measured), path))
        elif table.plot == "gates" and any(run.rows[0].gates_clean for run in runs.values()):
            written.append(usage(runs, path))
        elif table.plot == "flops":
            written.append(costs(runs, path))
        elif table.plot == "images" and (strips := {line.label: line.strip for line in lines if line.strip is not None}):
            written.append(images(strips, path))
    return written


def bar_of(line: Line, recovery: Measured, lines: Sequence[Line]) -> Bar:
    """A line as a bar."""
    paper = line.row.paper
    figure = paper.figures.get("recovery_percent") if paper is not None and quotes(line, lines) else None
    shown = Measured(0.0, math.nan, math.nan) if math.isnan(recovery.value) else recovery
    return Bar(line.label, shown, figure if isinstance(figure, (int, float)) else None, paper.dataset if paper else "")


def curves_of(lines: Sequence[Line], measured: Mapping[str, Mapping[str, Measured]]) -> list[Curve]:
    """The rows that sweep a setting as curves over the steps that their attacks took."""
    found = []
    for row in dict.fromkeys(line.row.label for line in lines if line.run is not None and line.row.sweep is not None):
        own = [line.run for line in lines if line.run is not None and line.row.label == row]
        own.sort(key=lambda run: run.summary["attack"]["steps"])
        found.append(Curve(row, [run.summary["attack"]["steps"] for run in own], [measured[run.name]["recovery_percent"] for run in own]))
    return found
