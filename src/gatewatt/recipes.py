"""Recipes: strict YAML fragments that extend one another and merge into one document.

A recipe may open with ``extends: [a.yaml, b.yaml]``, relative to itself or by the name of a shipped recipe. Fragments merge left to right,
the including file last; several ``-c`` on the command line merge the same way. Mappings merge key by key, everything else is replaced.
``key+: [...]`` appends to the list merged so far. When ``class_path`` changes, the ``init_args`` inherited from another class are dropped.

YAML leaves holes that a measurement must not fall through, so this reader closes them: duplicate keys, NaN and infinity, keys that are not
text, cycles, aliases that contain themselves or blow up, and files that are not text are all refused, naming file, line and key. Numbers
follow YAML 1.2: ``1e-3`` is a number (PyYAML alone reads text).

Only the standard library and PyYAML are imported here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from gatewatt.shipped import find_recipe

MAX_BYTES = 1_000_000  # a recipe is a page; a megabyte is a wrong file
MAX_VALUES = 100_000  # values after aliases are expanded; guards against a few lines that expand to gigabytes
MAX_DEPTH = 100  # nesting of mappings and lists
VERBS = ("fit", "validate", "test", "predict")

Key = tuple[str, ...]


class RecipeError(ValueError):
    """A recipe cannot be used; the message names the file, the line and the key."""


@dataclass(frozen=True)
class Origin:
    """Where a value was set."""

    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass
class Recipe:
    """One merged document.

    Attributes:
        settings: what the trainer's parser receives; no ``extends`` and no ``key+`` are left.
        origins: key path -> file and line that set it last; list entries are ``"0"``, ``"1"``, ...
        files: every file that took part, in merge order.
        running: everything that the recipe describes was built; a later error is less likely its fault.
        flags: what the command line adds, without the recipes; it wins over them.
        command: the whole command line, verb first.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    running: bool = False
    flags: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def origin(self, key: str) -> Origin | None:
        """Which file set ``key`` ("model.init_args.lr"), or the nearest group above it that a file set."""
        parts = tuple(part for part in key.replace("[", ".").replace("]", "").split(".") if part)
        for length in range(len(parts), 0, -1):
            if parts[:length] in self.origins:
                return self.origins[parts[:length]]
        return None


def load_recipes(names: Sequence[str | Path]) -> Recipe:
    """Read recipes and everything that they extend, and merge them left to right.

    Args:
        names: paths, or names of shipped recipes.

    Raises:
        RecipeError: for anything wrong inside a file, naming file, line and key.
        FileNotFoundError: for a name that is neither a file nor shipped.
    """
    merged = Recipe()
    for name in names:
        _merge_file(merged, find_recipe(name), ())
    return merged


def dump_recipe(settings: dict[str, Any]) -> str:
    """Write settings as YAML that :func:`load_recipes` reads back to equal values, keys in their order."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes every list out: an alias would be legal but hard to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Loader(yaml.SafeLoader):
    """Reads the four kinds of plain value that a recipe needs and nothing else (YAML 1.2 core; PyYAML alone follows 1.1).

    YAML 1.1 would read ``1e-3`` as text, ``1:30`` as 90, ``010`` as 8, ``no`` as false and ``2024-01-01`` as a date.
    """

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


_NULL, _BOOL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float"))
_DIGITS = list("-+0123456789")
_Loader.add_implicit_resolver(_NULL, re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9]+$"), _DIGITS)
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?i:inf)$|^\.(?i:nan)$"), [*_DIGITS, "."]
)


class _Fragment:
    """One file, read into settings with the origin of every key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origins: dict[Key, Origin] = {}
        self.settings = self._read()

    def _read(self) -> dict[str, Any]:
        root = compose_file(self.path)
        if root is None:
            raise RecipeError(f"{self.path}: the file is empty; a recipe is a mapping such as 'model: ...'")
        if not isinstance(root, yaml.MappingNode):
            raise RecipeError(f"{self.path}:{_line(root)}: a recipe must be a mapping of keys to values, got {_kind(root)}")
        self._values, self._open = 0, set[int]()
        return self._value(root, ())

    def fail(self, node: yaml.Node, key: Key, message: str) -> RecipeError:
        """The error for ``node``, naming file, line and key."""
        where = f"{self.path}:{_line(node)}"
        return RecipeError(f"{where}: {'.'.join(key)}: {message}" if key else f"{where}: {message}")

    def _value(self, node: yaml.Node, key: Key) -> Any:
        self._values += 1
        if self._values > MAX_VALUES:
            raise self.fail(node, key, f"the recipe expands to more than {MAX_VALUES:,} values; write it without nested aliases")
        if len(key) > MAX_DEPTH:
            raise RecipeError(f"{self.path}:{_line(node)}: mappings or lists are nested more than {MAX_DEPTH} deep")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, key)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise self.fail(node, key, f"tag {node.tag!r} is not allowed; recipes hold plain values only")
        if id(node) in self._open:
            raise self.fail(node, key, "an alias contains itself")
        self._open.add(id(node))
        assert isinstance(node, (yaml.MappingNode, yaml.SequenceNode))  # what is neither carries a tag that was refused
        value = self._mapping(node, key) if isinstance(node, yaml.MappingNode) else self._sequence(node, key)
        self._open.remove(id(node))
        return value

    def _mapping(self, node: yaml.MappingNode, key: Key) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for name_node, value_node in node.value:
            name = name_node.value
            if not isinstance(name_node, yaml.ScalarNode) or not isinstance(name, str):
                raise self.fail(name_node, key, "a key must be a word")
            if name == "<<" and name_node.style is None:
                raise self.fail(name_node, key, "merge keys (<<) are not read; use 'extends: [file.yaml]' at the top")
            if name_node.style is None and name_node.tag != "tag:yaml.org,2002:str":
                raise self.fail(name_node, (*key, name), f"a key must be a word, got {_kind(name_node)} {name!r}")
            if name in mapping:
                raise self.fail(name_node, (*key, name), f"the key appears twice (first on line {lines[name]})")
            lines[name], inner = _line(name_node), (*key, name)
            self.origins[inner] = Origin(self.path, _line(name_node))
            mapping[name] = self._value(value_node, inner)
        for name in mapping:
            if name.endswith("+") and name[:-1] in mapping:
                raise self.fail(node, (*key, name), f"{name!r} appends to an inherited list and {name[:-1]!r} replaces it; give one of the two")
        return mapping

    def _sequence(self, node: yaml.SequenceNode, key: Key) -> list[Any]:
        values = []
        for index, entry in enumerate(node.value):
            inner = (*key, str(index))
            self.origins[inner] = Origin(self.path, _line(entry))
            values.append(self._value(entry, inner))
        return values

    def _scalar(self, node: yaml.ScalarNode, key: Key) -> Any:
        if node.tag == _NULL:
            return None
        if node.tag == _BOOL:
            return node.value.lower() == "true"
        if node.tag == _INT:
            # Python itself refuses to convert integers of more than 4300 digits; nothing in a recipe needs more than 64 bits.
            if len(node.value) > 19:
                raise self.fail(node, key, f"the number has {len(node.value)} digits")
            return int(node.value)
        if node.tag == _FLOAT:
            word = node.value.lower().lstrip("+-")
            number = float("nan") if word in (".nan", ".inf") else float(node.value)
            if not math.isfinite(number):
                raise self.fail(node, key, f"numbers must be finite, got {node.value}")
            return number
        if node.tag != "tag:yaml.org,2002:str":
            raise self.fail(node, key, f"tag {node.tag!r} is not allowed; recipes hold plain values only")
        if node.value.lower().lstrip("+-.") in ("nan", "inf", "infinity"):
            # Python's float() reads these words, so a quoted or bare "nan" would reach a number field as a number.
            raise self.fail(node, key, f"numbers must be finite, got {node.value}")
        return node.value


def compose_file(path: Path) -> yaml.Node | None:
    """Read a file as UTF-8 YAML into nodes; every failure is a :class:`RecipeError` that names the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: {len(data):,} bytes is no recipe (the limit is {MAX_BYTES:,})")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a text file in UTF-8 (byte {error.start} is {data[error.start]:#04x})") from error
    try:
        return yaml.compose(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: mappings or lists are nested more than {MAX_DEPTH} deep") from error


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return {_NULL: "null", _BOOL: "true or false", _INT: "a number", _FLOAT: "a number"}.get(node.tag, "text")


def _merge_file(merged: Recipe, path: Path, including: tuple[Path, ...]) -> None:
    """Merge what ``path`` extends, then ``path`` itself, into ``merged``."""
    real = path.resolve()
    if real in including:
        chain = " -> ".join(str(step) for step in (*including[including.index(real) :], real))
        raise RecipeError(f"{path}: extends: recipes extend one another in a circle: {chain}")
    fragment = _Fragment(path)
    settings = fragment.settings
    for name in _extends(fragment):
        try:
            parent = find_recipe(name, relative_to=path.parent)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{fragment.origins['extends',]}: extends: {error}") from error
        _merge_file(merged, parent, (*including, real))
    if "config" in settings:
        raise RecipeError(f"{fragment.origins['config',]}: config: a recipe includes another with 'extends: [file.yaml]', not with 'config'")
    for verb in VERBS:
        if verb in settings:
            raise RecipeError(f"{fragment.origins[verb,]}: {verb}: a recipe's keys stand at the top, not under a verb")
    _Merge(merged, fragment.origins).mapping(settings, merged.settings, (), ())
    merged.files.append(path)


def _extends(fragment: _Fragment) -> list[str]:
    """Take ``extends`` out of a fragment."""
    value = fragment.settings.pop("extends", [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RecipeError(f"{fragment.origins['extends',]}: extends: must be a file name or a list of file names, got {value!r}")
    return names


@dataclass(frozen=True)
class _Merge:
    """Lays one fragment over what is merged so far.

    ``source`` is a key path in the fragment, ``target`` the one in the merged document; they differ below ``key+``.
    """

    merged: Recipe
    origins: dict[Key, Origin]

    def mapping(self, over: dict[str, Any], base: dict[str, Any], source: Key, target: Key) -> None:
        """Merge ``over`` into ``base`` in place."""
        if "class_path" in over and "class_path" in base and not _same_class(base["class_path"], over["class_path"]):
            # Another class has other arguments: what was meant for the old one must not reach the new one.
            for name in ("init_args", "dict_kwargs"):
                if base.pop(name, None) is not None:
                    self._forget((*target, name))
        for name, value in over.items():
            if name.endswith("+"):
                self._append(value, base, (*source, name), (*target, name[:-1]))
                continue
            inherited = base.get(name)
            if isinstance(value, dict) and isinstance(inherited, dict):
                there, here = (*source, name), (*target, name)
                self.merged.origins[here] = self.origins[there]
                self.mapping(value, inherited, there, here)
            else:
                self._forget((*target, name))
                base[name] = self._placed(value, (*source, name), (*target, name))

    def _append(self, value: Any, base: dict[str, Any], source: Key, target: Key) -> None:
        inherited = base.setdefault(target[-1], [])
        if not isinstance(value, list):
            raise RecipeError(f"{self.origins[source]}: {'.'.join(source)}: it appends to a list, so it must be a list itself")
        if not isinstance(inherited, list):
            raise RecipeError(f"{self.origins[source]}: {'.'.join(source)}: it appends to {target[-1]!r}, which is not a list")
        self.merged.origins[target] = self.origins[source]
        for index, entry in enumerate(value):
            inherited.append(self._placed(entry, (*source, str(index)), (*target, str(len(inherited)))))

    def _placed(self, value: Any, source: Key, target: Key) -> Any:
        """A copy of ``value`` where there is nothing to merge with, its origins noted."""
        self.merged.origins[target] = self.origins[source]
        if isinstance(value, dict):
            mapping: dict[str, Any] = {}
            self.mapping(value, mapping, source, target)
            return mapping
        if isinstance(value, list):
            return [self._placed(entry, (*source, str(index)), (*target, str(index))) for index, entry in enumerate(value)]
        return value

    def _forget(self, target: Key) -> None:
        for key in [key for key in self.merged.origins if key[: len(target)] == target]:
            del self.merged.origins[key]


def _same_class(old: Any, new: Any) -> bool:
    """Whether two class paths name one class; a short name ("SkipNet") is the same as the long one."""
    old, new = str(old), str(new)
    if "." in old and "." in new:
        return old == new
    return old.rpartition(".")[2] == new.rpartition(".")[2]
