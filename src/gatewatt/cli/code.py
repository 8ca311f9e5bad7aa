"""The code that a run's records depend on, as a hash.

Found by reading, not by importing: from the classes that a recipe names, along the imports of the files in which they are defined. A name imported
from a package leads to the file that the package took it from, so an edit of one network leaves the records of the others as they are.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gatewatt.shipped import PACKAGE


def code_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the code behind the classes of a recipe, without comments, docstrings and empty lines."""
    digest = hashlib.sha256()
    for path in sorted(files_behind(classes_of(settings))):
        digest.update(f"{path.relative_to(PACKAGE).as_posix()}\0{bare_file(path)}\0".encode())
    return digest.hexdigest()


def classes_of(settings: Any) -> set[str]:
    """Every ``class_path`` in a recipe.

    Example:
        >>> sorted(classes_of({"model": {"class_path": "a.B", "init_args": {"parts": [{"class_path": "a.C"}]}}}))
        ['a.B', 'a.C']
    """
    if isinstance(settings, Mapping):
        own = {settings["class_path"]} if isinstance(settings.get("class_path"), str) else set()
        return own.union(*map(classes_of, settings.values()))
    return set().union(*map(classes_of, settings)) if isinstance(settings, (list, tuple)) else set()


def files_behind(classes: Iterable[str]) -> set[Path]:
    """The files of gatewatt that define these classes, and those that they import from, to the end; other packages' are left out."""
    found: set[Path] = set()
    open_ends = [path for name in classes if (path := defining(*name.rpartition(".")[::2])) is not None]
    while open_ends:
        path = open_ends.pop()
        if path not in found:
            found.add(path)
            # What a package offers is not what it needs: its own file is followed for the name that was asked for alone.
            open_ends += [] if path.name == "__init__.py" else imported(path)
    return found


@cache
def imported(path: Path) -> tuple[Path, ...]:
    """The files that the imports of a file lead to, wherever in it they stand."""
    targets = [defining(module, name) for module, name in imports(path)]
    return tuple(dict.fromkeys(target for target in targets if target is not None))


def defining(module: str, name: str) -> Path | None:
    """The file in which ``name``, imported from ``module``, is defined; None outside of gatewatt."""
    submodule = source_of(f"{module}.{name}")
    if submodule is not None:
        return submodule
    path = source_of(module)
    if path is not None and path.name == "__init__.py":
        origin = next((source for source, other in imports(path) if other == name), None)
        if origin is not None:
            return defining(origin, name)
    return path


def source_of(module: str) -> Path | None:
    """The file of a module or package of gatewatt; None if there is none."""
    first, *others = module.split(".")
    if first != PACKAGE.name:
        return None
    place = PACKAGE.joinpath(*others)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


@cache
def imports(path: Path) -> tuple[tuple[str, str], ...]:
    """Module and name of everything that a file imports; ``import a.b`` is taken as ``from a import b``."""
    found: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name.rpartition(".")[::2] for alias in node.names]
    return tuple(found)


@cache
def bare_file(path: Path) -> str:
    """:func:`bare_code` of a file."""
    return bare_code(path.read_text(encoding="utf-8"))


def bare_code(source: str) -> str:
    r"""Python without comments, docstrings and empty lines.

    Written out again rather than parsed and dumped, whose result differs between versions of Python.

    Example:
        >>> bare_code('"What it is."\n\nx = 1  # why\ny = "# no comment"\n')
        'x = 1\ny = "# no comment"'
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for first, column, last in docstrings(ast.parse(source)):
        lines[first - 1 : last] = [lines[first - 1][:column], *[""] * (last - first)]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def docstrings(tree: ast.AST) -> Iterator[tuple[int, int, int]]:
    """First line, its column, and last line of every docstring."""
    for node in ast.walk(tree):
        body: Sequence[ast.stmt] = getattr(node, "body", ()) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) else ()
        first = body[0] if body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            yield first.lineno, first.col_offset, first.end_lineno or first.lineno
