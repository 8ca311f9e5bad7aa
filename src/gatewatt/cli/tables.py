"""Run the rows of tables that have no records yet, and render the tables.

Every run is an ordinary ``gatewatt test``, in this process and into a folder of its own, ``results/<key>``. ``key.json`` is written into it last:
a folder without one is what an interruption left, and the run is made again. So the same command starts a table, goes on with it, and renders
it when all is there; rows that two tables share are run once, and rows whose checkpoint or data is not there are left out and named. Several
reports may share a folder, on one machine or over a file system with locks: each takes the runs that no other holds.

Where nothing is to be run, records are rendered although the images that they were measured on are not at hand, or the code has changed since; the
page says the latter.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from gatewatt.cli.errors import explain
from gatewatt.cli.rows import NotRun, Options, Planned, asked_of, label_of, plan
from gatewatt.files import write_text
from gatewatt.recipes import Recipe
from gatewatt.reports.collect import ReportError, load_run
from gatewatt.reports.paper import Line, Section, render_page, render_table
from gatewatt.reports.plots import STRIP_FILE
from gatewatt.reports.recipe import TableRecipe, read_findings, read_table

KEY_FILE = "key.json"
"""What a run's key is the hash of; the mark of a complete run."""
UNMEASURED = "no records yet; gatewatt report with the table's own file runs it"


class Asked:
    """One line of a table: the run that it needs, or why there can be none.

    Args:
        line: the line, without records.
        runs: its run, and the one that keeps images if the table shows some.
    """

    def __init__(self, line: Line, runs: Sequence[Planned]) -> None:
        self.line, self.runs = line, runs

    def filled(self, results: Path, kept: Mapping[str, Sequence[Kept]]) -> Line:
        """The line with what has been measured.

        Args:
            results: folder of the runs.
            kept: records that may serve although their key is another, see :func:`kept_records`; empty for those of the key alone.

        Raises:
            ReportError: for records that do not add up.
        """
        if not self.runs:
            return self.line
        folders = [results / run.key for run in self.runs]
        older = False
        if not all(map(complete, folders)):
            others = [[one for one in kept.get(run.asked, ()) if run.identity["data"] in (None, one.data)] for run in self.runs]
            if not all(others):
                return replace(self.line, reason=UNMEASURED)
            if (several := next((found for found in others if len(found) > 1), None)) is not None:
                names = " and ".join(one.folder.name for one in several)
                return replace(self.line, reason=f"there are several records of it, {names}; remove those of older code")
            folders = [found[0].folder for found in others]
            older = any(found[0].code != run.identity["code"] for found, run in zip(others, self.runs, strict=True))
        strip = folders[1] / STRIP_FILE if len(folders) > 1 else None
        return replace(self.line, key=folders[0].name, run=load_run(folders[0], self.line.label), strip=strip, older=older)


class Kept(NamedTuple):
    """Records that are there.

    Attributes:
        folder: where they lie.
        code: hash of the code that measured them.
        data: hash of their images' names and sizes; None for embedded ones.
    """

    folder: Path
    code: str
    data: str | None


def report_tables(
    files: Sequence[Path],
    out: Path,
    options: Options,
    *,
    results: Path,
    measuring: bool = True,
    title: str = "Results",
    figures: bool = True,
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Run what is missing and render.

    Args:
        files: table recipes.
        out: folder for the page, CSV and figures.
        options: what the command line changes about every row.
        results: folder of the runs, one below it per key, and of what was found in them, if that is written down
            (:data:`~gatewatt.reports.recipe.FINDINGS_FILE`). Reports that run at the same time may share it.
        measuring: whether to run what is missing; otherwise lines without records say so.
        title: first line of a page of several tables.
        figures: whether to draw; needs matplotlib.
        formats: suffixes of the figures.

    Returns:
        The files written, the page first: ``RESULTS.md``, or that of a single table.

    Raises:
        ReportError: for a table recipe or a row that is wrong, in one line; of what was measured nothing is lost.
    """
    # All of them before the first run: a slip in the last table should not come out after hours.
    options = replace(options, measuring=measuring)
    asked = ask(files, options)
    findings = read_findings(results, [table for table, _ in asked.values()])
    if measuring:
        for line in left_out(asked):
            print(f"gatewatt: {line}", file=sys.stderr, flush=True)
        needed = {run.key: (table, one, run) for table, lines in asked.values() for one in lines for run in one.runs}
        missing = {key: entry for key, entry in needed.items() if not complete(results / key)}
        measure_all(missing, results)
    kept = {} if measuring else kept_records(results)
    sections: list[Section] = []
    for table, lines in asked.values():
        filled, finding = [one.filled(results, kept) for one in lines], findings.get(table.name, "")
        sections.append(render_table(table, filled, out, finding=finding, figures=figures, formats=formats))
    if len(asked) == 1:
        (name,) = asked
        page = write_text(out / f"{name}.md", render_page(asked[name][0].title, sections))
    else:
        page = write_text(out / "RESULTS.md", render_page(title, sections))
    return [page, *(file for section in sections for file in section.files)]


def ask(files: Sequence[Path], options: Options) -> dict[str, tuple[TableRecipe, list[Asked]]]:
    """Every table by its name, with its lines; errors as for :func:`report_tables`."""
    asked = {table.name: (table, list(lines_of(table, options))) for table in map(read_table, files)}
    if len(asked) < len(files):
        raise ReportError(f"two table recipes have the same file name among {', '.join(map(str, files))}; their files would overwrite each other")
    return asked


def left_out(asked: Mapping[str, tuple[TableRecipe, Sequence[Asked]]]) -> list[str]:
    """One line for every row that cannot be run, and why."""
    missing = [(name, one.line) for name, (_, lines) in asked.items() for one in lines if not one.runs]
    # The points of a sweep have one reason.
    return list(dict.fromkeys(f"{name}: {line.row.label}: left out, {line.reason}" for name, line in missing))


def dry_run(files: Sequence[Path], options: Options, *, results: Path) -> str:
    """What :func:`report_tables` would run, as text: per table every run, how many others need too, and what has records already.

    Work is counted in image-steps, test images times iterations of the attack, since a run's time is in proportion to it.
    """
    asked = ask(files, options)
    needed = {name: {run.key: run for one in lines for run in one.runs} for name, (_, lines) in asked.items()}
    wanted = Counter(key for runs in needed.values() for key in runs)
    text = []
    for name, runs in needed.items():
        shared = sum(wanted[key] > 1 for key in runs)
        text.append(f"{name}: {tally(runs.values(), results)}" + f", {shared} needed by other tables too" * (len(needed) > 1))
        text += [f"  {'recorded' if complete(results / key) else 'to run  '}  {key}  {run.label}, {size_of(run)}" for key, run in runs.items()]
    text += left_out(asked)
    if len(needed) > 1:
        text.append(f"all: {tally({key: run for runs in needed.values() for key, run in runs.items()}.values(), results)}")
    return "\n".join(text)


def tally(runs: Iterable[Planned], results: Path) -> str:
    """How many runs there are, how many have records, and the work that is left."""
    runs = list(runs)
    missing = [run for run in runs if not complete(results / run.key)]
    steps = sum(images * (steps or 1) for images, steps in map(work_of, missing))
    return f"{len(runs)} runs, {len(runs) - len(missing)} recorded, {len(missing)} to run ({steps:,} image-steps)"


def size_of(run: Planned) -> str:
    """Images and steps of a run, in words."""
    images, steps = work_of(run)
    return f"{images} images" + (f" x {steps} steps" if steps else "") + ", the ones that are shown" * (run.verb == "predict")


def work_of(run: Planned) -> tuple[int, int | None]:
    """Test images and iterations of a run; None for an attack whose recipe counts no steps."""
    settings = run.recipe.settings
    return settings["data"]["init_args"]["test_images"], settings["model"]["init_args"]["attack"].get("init_args", {}).get("steps")


def lines_of(table: TableRecipe, options: Options) -> Iterator[Asked]:
    """Every line of a table, with the runs that it needs."""
    for row in table.rows:
        for point in row.points:
            line = Line(label_of(table, row, point, options), row, point)
            try:
                runs = [plan(table, row, point, options)]
                if table.plot == "images":
                    runs.append(plan(table, row, point, options, strip=True))
            except NotRun as reason:
                yield Asked(replace(line, reason=str(reason)), [])
            except FileNotFoundError as error:
                raise ReportError(f"{row.place}: {error}") from None
            else:
                yield Asked(replace(line, key=runs[0].key), runs)


def complete(folder: Path) -> bool:
    """Whether a run's folder holds a whole run."""
    return (folder / KEY_FILE).is_file()


def kept_records(results: Path) -> dict[str, list[Kept]]:
    """Every complete run by what was asked of it, whatever code measured it on whatever folder of images.

    Raises:
        ReportError: for a run whose mark cannot be read.
    """
    found: dict[str, list[Kept]] = {}
    for mark in sorted(results.glob(f"*/{KEY_FILE}")):
        try:
            identity = json.loads(mark.read_text(encoding="utf-8"))
            found.setdefault(asked_of(identity), []).append(Kept(mark.parent, identity["code"], identity["data"]))
        except (ValueError, LookupError, AttributeError):
            raise ReportError(f"{mark} cannot be read; remove {mark.parent}, and its run is made again") from None
    return found


def measure_all(missing: Mapping[str, tuple[TableRecipe, Asked, Planned]], results: Path) -> None:
    """Run what is missing, one after the other. What another report is running is left to it, and waited for at the end.

    Raises:
        ReportError: as :func:`measure`.
        SystemExit: likewise.
    """
    turns = deque((number, entry, False) for number, entry in enumerate(missing.values(), 1))
    while turns:
        number, (table, one, planned), wait = turns.popleft()
        folder = results / planned.key
        said = f"{table.name}: {planned.label} (run {number} of {len(missing)}, {folder})"
        try:
            with claim(folder, wait=wait) as still_missing:
                if still_missing:
                    print(f"gatewatt: {said}", file=sys.stderr, flush=True)
                    measure(planned, folder, one.line.row.place)
        except Timeout:
            print(f"gatewatt: {said} is being run by another report", file=sys.stderr, flush=True)
            turns.append((number, (table, one, planned), True))


@contextmanager
def claim(folder: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other reports away from a run's folder; the value says whether the run is still to be made. A claim ends with its process.

    Raises:
        Timeout: another report has claimed it, and ``wait`` is false.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    with lock.acquire(blocking=wait):
        yield not complete(folder)
        if complete(folder):
            # Whoever still waits for this file finds the run complete.
            Path(lock.lock_file).unlink(missing_ok=True)


def measure(planned: Planned, folder: Path, place: str) -> None:
    """Run one row into ``folder``, as ``gatewatt test`` would.

    Raises:
        ReportError: in one line, if the row cannot be run.
        SystemExit: if the run was terminated.
    """
    # Heavy, and needed only where something is missing.
    from gatewatt.cli.trainer import run

    if folder.exists():
        # Half a run of ours: by its name a hash, and without the mark that is written last.
        shutil.rmtree(folder)
    recipe = Recipe({**planned.recipe.settings, "run": str(folder)}, planned.recipe.origins, planned.recipe.files, command=[planned.verb])
    try:
        code = run(planned.verb, recipe, [])
    except Exception as error:
        line = None if hasattr(error, "exit_code") else explain(error, recipe)
        if line is None:
            raise
        raise ReportError(f"{place}: {planned.label}: {line}") from error
    if code:
        raise SystemExit(code)
    write_text(folder / KEY_FILE, json.dumps(planned.identity, indent=2, sort_keys=True) + "\n")
    # A row's network, images and graph are gone before the next row's come.
    gc.collect()
