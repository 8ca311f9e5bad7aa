"""report: render run folders, or run what a table recipe lacks and render it with the paper's figures beside ours."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path

from gatewatt.cli import PROGRAM, UsageError
from gatewatt.cli.errors import flag_values
from gatewatt.cli.rows import ROOTED, Options
from gatewatt.shipped import find_recipe, shipped_folder

TABLES = "tables"
"""Folder of the shipped recipes that holds tables."""
TABLE_OPTIONS = ("images", "steps", "seed", "results", "no_run", "dry_run")


def render(arguments: Sequence[str]) -> int:
    """Run ``report``: its own small parser, since what has been measured is rendered without torch."""
    fields, rest = split_fields(arguments)
    parser = ArgumentParser(prog=f"{PROGRAM} report", add_help=False, exit_on_error=False)
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-o", "--out", default="report")
    parser.add_argument("--title", default="Results")
    parser.add_argument("--no-figures", action="store_true")
    parser.add_argument("--formats", default="png")
    parser.add_argument("--images", type=count)
    parser.add_argument("--steps", type=count)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--results")
    parser.add_argument("--no-run", action="store_true", default=None)
    parser.add_argument("--dry-run", action="store_true", default=None)
    options, unknown = parser.parse_known_args(rest)
    if unknown:
        raise UsageError(f"report has no option {unknown[0]}; see {PROGRAM} report --help")
    if not options.paths:
        raise UsageError("report needs folders with runs, such as: gatewatt report runs")
    tables = [table_files(path) for path in options.paths]
    if not any(tables):
        given = fields + [f"--{name.replace('_', '-')}" for name in TABLE_OPTIONS if getattr(options, name) is not None]
        if given:
            raise UsageError(f"{given[0]} is for table recipes; {options.paths[0]} is none")
        from gatewatt.reports import report

        written = report(options.paths, options.out, title=options.title, figures=not options.no_figures, formats=options.formats.split(","))
    else:
        for path, found in zip(options.paths, tables, strict=True):
            if not found:
                raise UsageError(f"{path} is no table recipe, others are; report tables and run folders one after the other")
        from gatewatt.cli.tables import dry_run, report_tables

        files = list(dict.fromkeys(file for found in tables for file in found))
        changed, results = row_options(options, fields), Path(options.results or "results")
        if options.dry_run:
            print(dry_run(files, changed, results=results))
            return 0
        written = report_tables(
            files,
            Path(options.out),
            changed,
            results=results,
            # A folder asks for one page of what has been measured; what has not may take hours.
            measuring=not options.no_run and all(table_folder(path) is None for path in options.paths),
            title=options.title,
            figures=not options.no_figures,
            formats=options.formats.split(","),
        )
    print("\n".join(map(str, written)))
    return 0


def table_files(path: str) -> list[Path]:
    """The table recipes that a path or a shipped name means; none if it means run folders.

    A folder of tables is one with YAML files of its own that are no run's resolved recipe; of shipped tables, ``recipes/tables``.
    """
    folder = table_folder(path)
    if folder is not None:
        return sorted(file for file in folder.glob("*.yaml") if file.name != "recipe.yaml")
    return [find_recipe(path)] if Path(path).suffix == ".yaml" or Path(path).parts[:1] == (TABLES,) else []


def table_folder(path: str) -> Path | None:
    """The folder that a path means, if it means one."""
    if Path(path).is_dir():
        return Path(path)
    return shipped_folder("recipes") / TABLES if path.rstrip("/") in (TABLES, f"recipes/{TABLES}") else None


def split_fields(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take every field of a recipe, ``--data.root FOLDER`` or ``--model.attack.gamma=3``, out of a command line.

    Returns:
        The flags with their values, and the rest.

    Example:
        >>> split_fields(["t.yaml", "--data.root", "a", "-o", "b", "--model.attack.gamma=3"])
        (['--data.root', 'a', '--model.attack.gamma=3'], ['t.yaml', '-o', 'b'])
    """
    fields: list[str] = []
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name = argument.partition("=")[0]
        if not name.startswith("--") or "." not in name:
            rest.append(argument)
            continue
        fields.append(argument)
        if "=" not in argument:
            value = next(remaining, "--")
            if value.startswith("--"):
                raise UsageError(f"{argument} needs a value")
            fields.append(value)
    return fields, rest


def row_options(options: Namespace, fields: Sequence[str]) -> Options:
    """What the command line changes about every row."""
    roots: dict[str, Path] = {}
    changed = {}
    for leaf in flag_values(fields):
        if leaf.key != ("data", "root"):
            changed[".".join(leaf.key)] = leaf.value
            continue
        name, given, folder = str(leaf.value).rpartition("=")
        name = name if given else "cifar10"
        if name not in ROOTED or not folder:
            raise UsageError(f"--data.root: must be a folder, or NAME=FOLDER with NAME among {', '.join(ROOTED)}, got {leaf.value!r}")
        roots[name] = Path(folder)
    return Options(roots=roots, images=options.images, steps=options.steps, seed=options.seed or 0, fields=changed)


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number of 1 or more, got {text}")
    return int(text)
