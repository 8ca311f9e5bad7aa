"""One line per mistake: what the libraries below say, without their nesting, and with the recipe file and line that set the key."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from gatewatt.recipes import Key, Recipe, RecipeError

LONGEST = 400  # characters of one line
_EXPECTED = (
    ("argparse", "ArgumentError"),
    ("lightning.fabric.utilities.exceptions", "MisconfigurationException"),
    ("gatewatt.flops", "UnpricedOperator"),
)
_KNOWN = (
    (
        "has parameters that were not used in producing the loss",
        "some parameters got no gradient in this step, which several processes must know of: add --trainer.strategy ddp_find_unused_parameters_true",
    ),
)
"""What libraries say at length, and what it means here."""
GROUPS = ("model", "data", "trainer", "seed_everything", "run", "resume", "ckpt_path")
_SHELL = ("Does not validate against any", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")


class Complaint(NamedTuple):
    """The heart of a nested message.

    Attributes:
        key: path of the field, as far as it is known.
        message: what is wrong with it.
        given: whether a flag, rather than a recipe, gave the value.
    """

    key: Key
    message: str
    given: bool


class Leaf(NamedTuple):
    """One plain value, from a recipe or from the command line.

    Attributes:
        key: its path, as the recipe or the flag writes it.
        value: the value.
        place: what an error opens with: file, line and key, or the flag.
    """

    key: Key
    value: Any
    place: str


def explain(error: Exception, recipe: Recipe) -> str | None:
    """One line for an error that the user can mend, or None for one that is a fault of gatewatt.

    Args:
        error: what was raised.
        recipe: the merged recipe, whose origins name files.
    """
    if isinstance(error, RecipeError):
        return one_line(str(error))
    if hasattr(error, "exit_code"):
        # Already a line of its own, and one that holds a command to be copied.
        return str(error)
    for phrase, line in _KNOWN:
        if phrase in str(error):
            return line
    if not isinstance(error, expected()):
        return None
    complaint = condense(str(error) or type(error).__name__)
    if complaint.key:
        key = ".".join(complaint.key)
        flag = None if complaint.given else responsible(complaint, recipe.flags)
        if flag is not None:
            return one_line(f"{flag}: {complaint.message}")
        origin = None if complaint.given else recipe.origin(key)
        # jsonargparse leaves out which entry of a list it speaks of.
        entries = [path for path in recipe.origins if tuple(part for part in path if not part.isdecimal()) == complaint.key]
        if origin is not None and len(entries) == 1:
            key, origin = ".".join(entries[0]), recipe.origins[entries[0]]
        return one_line(f"{origin}: {key}: {complaint.message}" if origin else f"--{key}: {complaint.message}")
    if complaint.given or re.match(r"--|argument --|unrecognized arguments", complaint.message):
        return one_line(complaint.message)
    suspect = blame(complaint.message, recipe, certain=recipe.running)
    if suspect is not None:
        if "'NoneType'" in complaint.message:
            return one_line(f"{suspect.place}: must not be null")
        message = complaint.message
        for key in (".".join(suspect.key), suspect.place):
            message = message.removeprefix(f"{key}: ")
        return one_line(f"{suspect.place}: {message}")
    return one_line(f"{recipe.files[-1]}: {complaint.message}" if recipe.files and not recipe.running else complaint.message)


def alike(error: Exception) -> bool:
    """Whether every process meets an error at the same moment, so that it is enough if the first one says so."""
    return bool(getattr(error, "alike", False)) or any(phrase in str(error) for phrase, _ in _KNOWN)


def expected() -> tuple[type[Exception], ...]:
    """Errors that stem from what the user gave. Libraries that were not imported cannot have raised theirs."""
    named = [getattr(sys.modules.get(module), name, None) for module, name in _EXPECTED]
    return (ValueError, TypeError, OSError, *(kind for kind in named if kind is not None))


def one_line(text: str) -> str:
    """Join lines, and cut what no one reads."""
    joined = re.sub(r"\s+", " ", text).strip()
    return joined if len(joined) <= LONGEST else joined[: LONGEST - 4] + " ..."


def condense(text: str) -> Complaint:
    r"""Find key and cause in jsonargparse's nested message; a message of another kind is returned as it is.

    Example:
        >>> condense('Parser key "trainer.max_steps":\n  Expected a <class \'int\'>. Got value: [1]')
        Complaint(key=('trainer', 'max_steps'), message='must be int, got [1]', given=False)
    """
    key: list[str] = []
    owner = ""
    wanted: list[str] = []
    value = ""
    cause = ""
    for line in text.splitlines():
        content = line.strip().removeprefix("- ")
        if match := re.match(r'Parser key "([^"]+)": ?(.*)', content):
            key += ["init_args"] * bool(owner) + match[1].split(".")
            owner, content = "", match[2]
        elif match := re.match(r"Problem with given class_path '([^']+)': ?(.*)", content):
            owner, content = match[1], match[2]
        if match := re.match(r"Expected a (<class '[^']+'>|typing\.Literal\[.*\]|[\w.]+\[.*\])(?:\. Got value: (.*))?$", content):
            if "NoneType" not in content:
                wanted.append(readable(match[1]))
                value = value or match[2] or ""
            continue
        if match := re.match(r"Given value: (.*)", content):
            value = value or match[1]
            if wanted:
                break
        if content not in ("", "-") and not content.startswith(_SHELL):
            cause = content
            break
    given = "NestedArg(" in text
    if not cause and wanted:
        cause = f"must be {' or '.join(dict.fromkeys(wanted))}, got {nested_value(value)}"
    if match := re.match(r"Option '([^']+)' is not accepted", cause):
        unknown = match[1].split(".")[0]
        key += ["init_args"] * bool(owner) + [unknown]
        cause = f"{owner.rpartition('.')[2]} has no field {unknown!r}{suggestion(owner, unknown)}"
    elif match := re.match(r"Subcommand '(\w+)' does not accept option '([^']+)'", cause):
        key = match[2].split(".")
        if key[0] == "trainer" and len(key) > 1:
            cause = f"there is no such field{suggestion('lightning.pytorch.Trainer', key[1])}"
        else:
            # jsonargparse names the first value inside; the mistake is the group.
            key = key[:1]
            near = get_close_matches(key[0], GROUPS, n=1)
            cause = f"there is no such field; did you mean {near[0]}?" if near else f"there is no such field; a recipe has {', '.join(GROUPS)}"
    elif match := re.match(r"the following arguments are required: (.*)", cause):
        missing = re.sub(r"\b(?:fit|validate|test|predict)\.", "", match[1])
        cause = "no task is given; add one, such as -c task/train" if missing == "model" else f"{missing} must be given"
    elif owner and re.match(r"module '[^']+' has no attribute|No module named", cause):
        key += ["class_path"]
        cause = f"there is no class {owner}"
    elif match := re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", cause):
        key += ["class_path"]
        cause = f"{match[1]} is no {match[2]}"
    elif match := re.match(r"Expected a dot import path string: (.*)", cause):
        cause = f"there is no class {match[1]!r}; give its dotted path, such as gatewatt.networks.SkipNet"
    return Complaint(tuple(key), cause or text, given)


def readable(kind: str) -> str:
    """A type as a user writes it: ``<class 'int'>`` is int, a Literal its values."""
    if match := re.match(r"<class '(?:[\w.]+\.)?(\w+)'>", kind):
        return match[1]
    if match := re.match(r"typing\.Literal\[(.*)\]", kind):
        return f"one of {match[1]}"
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", kind)


def nested_value(value: str) -> str:
    """The value within jsonargparse's wrapper for flags."""
    match = re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", value)
    return match[1] if match else value


def suggestion(class_path: str, name: str) -> str:
    """The field of a class that ``name`` may have meant."""
    module, _, attribute = class_path.rpartition(".")
    try:
        fields = list(inspect.signature(getattr(importlib.import_module(module), attribute)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return ""
    near = get_close_matches(name, fields, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; its fields are {', '.join(fields)}" if len(fields) <= 20 else ""


def plain(key: Key) -> Key:
    """A key path without what a flag may leave out: ``model.network.depth`` is ``model.init_args.network.init_args.depth``."""
    return tuple(part for part in key if part not in ("init_args", "dict_kwargs") and not part.isdecimal())


def flag_values(flags: Sequence[str]) -> Iterator[Leaf]:
    """Every flag of a command line with its value.

    Example:
        >>> [leaf.value for leaf in flag_values(["--trainer.max_steps=3", "--model.network", "SkipNet", "--print_config"])]
        [3, 'SkipNet', None]
    """
    for index, word in enumerate(flags):
        if not word.startswith("--") or word == "--":
            continue
        name, _, text = word.partition("=")
        following = flags[index + 1] if index + 1 < len(flags) else ""
        if "=" not in word:
            text = "" if following.startswith("--") else following
        yield Leaf(tuple(name[2:].removesuffix("+").split(".")), read_value(text), name)


def read_value(text: str) -> Any:
    """A flag's text as the parser will read it: a number, true, false, null, or the text."""
    words = {"true": True, "false": False, "null": None, "": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def responsible(complaint: Complaint, flags: Sequence[str]) -> str | None:
    """The flag that gave the value a complaint is about, if one did."""
    asked = plain(complaint.key)
    for leaf in flag_values(flags):
        key = plain(leaf.key)
        # A recipe's own value of that key is checked first, so the flag's must be the one that is told.
        if key == asked[: len(key)] and (leaf.value is None or str(leaf.value) in complaint.message):
            return leaf.place
    return None


def in_force(recipe: Recipe) -> list[Leaf]:
    """The values that a run was built from: those of the recipe, unless a flag replaces them, and those of the flags."""
    flags = list(flag_values(recipe.flags))
    replaced = [plain(leaf.key) for leaf in flags]
    kept = [
        Leaf(key, value, f"{recipe.origins[key]}: {'.'.join(key)}")
        for key, value in leaves(recipe.settings)
        if key in recipe.origins and not any(plain(key)[: len(path)] == path for path in replaced)
    ]
    return kept + flags


def blame(message: str, recipe: Recipe, *, certain: bool) -> Leaf | None:
    """The one value of a recipe or a flag that a message speaks of, if it is clear which: by its name, its value, or both.

    Args:
        message: what a constructor said, such as "depth must be 6n + 2, got 9".
        recipe: the merged recipe, with the flags.
        certain: ask for name and value.
    """
    _, got, after = message.rpartition("got ")
    words, received = (re.findall(r"[\w.:/-]*\w", part) for part in (message, after if got else ""))
    scored: list[tuple[int, Leaf]] = []
    for leaf in in_force(recipe):
        key, value = leaf.key, leaf.value
        # A message names its argument first and often explains with others, so a name in the first place counts double.
        named = (2 if words[:1] == [key[-1]] else 1) if key[-1] in words else 0
        assigned = f"{key[-1]}={value!r}" in message or ".".join(key) in words
        valued = mentioned(value, words, received)
        if assigned or (named and valued) or (not certain and (named or valued)):
            scored.append((named + 2 * valued + 4 * assigned, leaf))
    best = [leaf for score, leaf in scored if score == max(score for score, _ in scored)]
    return best[0] if len(best) == 1 else None


def mentioned(value: Any, words: list[str], received: list[str]) -> bool:
    """Whether a message speaks of a value; ``received`` are its words after "got".

    Short numbers and true or false stand in many a message by chance, so they count only where it says what it got.
    """
    if value is None:
        return "NoneType" in words
    text = str(value).rstrip("/")
    if isinstance(value, str):
        return len(text) > 1 and text in words
    return text in received or (len(text) > 4 and text in words)


def leaves(value: Any, key: Key = ()) -> list[tuple[Key, Any]]:
    """Every plain value of a document with its key path."""
    if isinstance(value, dict):
        return [leaf for name, below in value.items() for leaf in leaves(below, (*key, name))]
    if isinstance(value, list):
        return [leaf for index, below in enumerate(value) for leaf in leaves(below, (*key, str(index)))] or [(key, value)]
    return [(key, value)]
