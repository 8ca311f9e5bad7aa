"""From a row of a table to the test run that it is: the merged recipe, and the key under which its records lie.

The key is a hash of what determines the records and of nothing else: the merged recipe without what only says where or how comfortably it runs
(paths, loggers, devices), the bytes of the weights, the test files, and the code behind the classes that the recipe names (:mod:`gatewatt.cli.code`).
The code itself, not its version: who edits an attack in a checkout must not be shown the figures of the attack before. Comments and docstrings do
not count. Versions of torch and of the machine do not either, since they move last digits only; every summary names them. None of this imports
torch, so a table whose records exist is rendered at once.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gatewatt.cli.code import code_digest
from gatewatt.recipes import Recipe, load_recipes
from gatewatt.reports.collect import ReportError
from gatewatt.reports.recipe import SUBSETS, SWEPT_STEPS, Row, TableRecipe
from gatewatt.shipped import find_checkpoint, shipped

HARMLESS = frozenset(
    {f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "log_every_n_steps", "profiler")}
    | {f"trainer.enable_{name}" for name in ("checkpointing", "progress_bar", "model_summary")}
    | {f"data.init_args.{name}" for name in ("root", "workers", "download")}
    | {f"model.init_args.{name}" for name in ("checkpoint", "source_checkpoint", "channels_last")}
    | {"run", "resume", "ckpt_path"}
)
"""Fields that change no record. Weights and test files count by what they hold. Whatever is not listed counts."""
FORMAT = 1
"""Of the key; another number makes all records unknown."""


class NotRun(Exception):
    """Why a row has no records, in one line."""


class DataSet(NamedTuple):
    """How rows get at a data set: its fragment, fields beside it, and the images there are at most."""

    recipe: str
    fields: Mapping[str, Any] = {}
    at_most: int | None = None


DATA_SETS: dict[str, DataSet] = {
    "digits": DataSet("data/digits", at_most=400),
    "cifar10": DataSet("data/folder", {"data.name": "cifar10"}),
    "cifar100": DataSet("data/cifar100"),
    "cub200": DataSet("data/cub200"),
    "imagenet": DataSet("data/imagenet-folder", {"data.name": "imagenet"}),
}
ROOTED = tuple(name for name in DATA_SETS if name != "digits")
"""Those that lie in a folder; digits come with a package."""
ORIGINAL = {"cifar10": ("cifar-10-batches-py", "data/cifar10")}
"""Data set -> folder that its authors' files unpack to, and the fragment that reads them."""
TEST_FILES = {"CIFAR10Data": ("cifar-10-batches-py",), "CIFAR100Data": ("cifar-100-python",)}
"""Data module -> what below its root holds the test images; a FolderData names it itself, of others everything counts."""


@dataclass(frozen=True)
class Options:
    """What the command line changes about every row.

    Attributes:
        roots: data set -> its folder.
        images: test images, instead of the table's.
        steps: steps of the attacks, instead of the table's.
        seed: of the runs.
        fields: dotted field -> value.
        measuring: whether rows are to be run. Otherwise they may do without the folder of their images: records of them may be there.
    """

    roots: Mapping[str, Path] = field(default_factory=dict)
    images: int | None = None
    steps: int | None = None
    seed: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    measuring: bool = True


@dataclass(frozen=True)
class Planned:
    """One run of a row.

    Attributes:
        label: of the row, and the point of its sweep.
        verb: ``test``, or ``predict`` for a strip of images.
        recipe: merged, every field in place.
        identity: what the key is the hash of.
    """

    label: str
    verb: str
    recipe: Recipe
    identity: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Name of the run's folder."""
        return hashlib.sha256(canonical(self.identity).encode()).hexdigest()[:16]

    @property
    def asked(self) -> str:
        """What was asked of the run: the same network, attack and images, by whatever code, and from whatever folder if none is given."""
        return asked_of(self.identity)


def asked_of(identity: Mapping[str, Any]) -> str:
    """:attr:`Planned.asked` of an identity."""
    return canonical({key: value for key, value in identity.items() if key not in ("code", "data")})


def label_of(table: TableRecipe, row: Row, point: float | None, options: Options) -> str:
    """The row's label, with the point of the sweep.

    A multiple of the table's steps is shown as the steps that it comes to.
    """
    if row.sweep is None or point is None:
        return row.label
    name, _ = row.sweep
    if name == SWEPT_STEPS:
        return f"{row.label}, {steps_of(table, point, options)} steps"
    return f"{row.label}, {name.rpartition('.')[2]} {point:g}"


def steps_of(table: TableRecipe, times: float, options: Options) -> int:
    """Steps of an attack that takes ``times`` the table's."""
    return max(1, round(times * (options.steps or table.steps)))


def compose(table: TableRecipe, row: Row, point: float | None, options: Options, *, strip: bool = False) -> Recipe:
    """Merge a row's recipe as ``gatewatt test`` would run it.

    Args:
        table: the row's table.
        row: the row.
        point: value of its sweep; None without one.
        options: of the command line.
        strip: the few images to be shown, instead of all that are measured.

    Raises:
        NotRun: if the checkpoint or the data set is not there.
        ReportError: for a field that does not fit the recipe.
        RecipeError, FileNotFoundError: for a fragment that is wrong or missing.
    """
    card = card_beside(checkpoint_file(row.checkpoint))
    name = row.data or str(card.get("dataset"))
    if name not in DATA_SETS:
        raise ReportError(f"{row.place}: data: must be one of {', '.join(DATA_SETS)}, got {name!r}")
    data, root = DATA_SETS[name], options.roots.get(name)
    if root is not None and name in ORIGINAL and (root / ORIGINAL[name][0]).is_dir():
        data = DataSet(ORIGINAL[name][1])
    recipe = load_recipes(["task/attack", data.recipe, *row.recipes])
    settings = recipe.settings
    merge(settings, "model.network", network_of(card))
    merge(settings, "model.checkpoint", row.checkpoint)
    if row.source is not None:
        merge(settings, "model.source", network_of(card_beside(checkpoint_file(row.source))))
        merge(settings, "model.source_checkpoint", row.source)
    wanted = options.images or table.images
    images = wanted if data.at_most is None else min(wanted, data.at_most // (len(SUBSETS) if row.subset else 1))
    fields: dict[str, Any] = {"seed_everything": options.seed, "data.seed": options.seed, **data.fields, **row.fields}
    fields["data.test_images"] = min(table.strip, images) if strip else images
    # Subset A is the images that a row without subsets has: it is given no offset, so that the two share their records.
    if row.subset and (offset := SUBSETS.index(row.subset) * images):
        fields["data.test_offset"] = offset
    times = row.times_steps
    if row.sweep is not None and point is not None:
        if row.sweep[0] == SWEPT_STEPS:
            times = point
        else:
            fields[row.sweep[0]] = point
    if times:
        fields["model.attack.steps"] = steps_of(table, times, options)
    if root is not None:
        fields["data.root"] = str(root)
    if strip:
        fields["trainer.callbacks"] = [{"class_path": "gatewatt.cli.strip.ImageStrip"}]
    for key, value in {**fields, "trainer.logger": False, **options.fields}.items():
        try:
            merge(settings, key, value)
        except KeyError as error:
            raise ReportError(f"{row.place}: {key}: {error.args[0]}") from None
    if options.measuring or root is not None:
        check_data(settings, name)
    return recipe


def plan(table: TableRecipe, row: Row, point: float | None, options: Options, *, strip: bool = False) -> Planned:
    """A row's run and its key; arguments and errors as for :func:`compose`."""
    recipe = compose(table, row, point, options, strip=strip)
    verb = "predict" if strip else "test"
    settings = determining(recipe.settings)
    identity = {
        "format": FORMAT,
        "verb": verb,
        "recipe": settings,
        "weights": file_digest(checkpoint_file(row.checkpoint)),
        "source_weights": None if row.source is None else file_digest(checkpoint_file(row.source)),
        "data": data_digest(recipe.settings),
        "code": code_digest(settings),
    }
    return Planned(label_of(table, row, point, options), verb, recipe, identity)


def checkpoint_file(name: str) -> Path:
    """The weights that a name means.

    Raises:
        NotRun: if there are none, saying how they are made where a shipped recipe makes them.
    """
    try:
        return find_checkpoint(name)
    except FileNotFoundError:
        made = f"; gatewatt fit -c {name} trains one" if name in shipped("recipes", ".yaml") else ""
        raise NotRun(f"no checkpoint {name}{made}") from None


def card_beside(weights: Path) -> dict[str, Any]:
    """The card of a checkpoint, as far as a row needs it; the weights are checked against it when they are loaded.

    Raises:
        NotRun: if there is none.
    """
    try:
        card = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise NotRun(f"{weights} has no readable card beside it") from None
    if not isinstance(card, dict) or not isinstance(card.get("network"), str) or not isinstance(card.get("arguments"), dict):
        raise NotRun(f"the card of {weights} names no network")
    return card


def network_of(card: Mapping[str, Any]) -> dict[str, Any]:
    """The network of a card, as a recipe writes it."""
    return {"class_path": f"gatewatt.networks.{card['network']}", "init_args": copy.deepcopy(card["arguments"])}


def check_data(settings: Mapping[str, Any], name: str) -> None:
    """Raise unless the test images of a row are there.

    Raises:
        NotRun: naming the option that is missing, or the folder.
    """
    data = settings["data"]
    if data["class_path"].endswith("DigitsData"):
        return
    root = data["init_args"].get("root") if data.get("init_args") else None
    if root is None:
        raise NotRun(f"no folder for {name}; give --data.root {'' if name == 'cifar10' else f'{name}='}FOLDER")
    missing = next((folder for folder in image_folders(settings) if not folder.is_dir()), None)
    if missing is not None:
        raise NotRun(f"no folder {missing} with the test images of {name}")


def image_folders(settings: Mapping[str, Any]) -> list[Path]:
    """Where the test images of a recipe lie; empty for a data set that is embedded."""
    data = settings["data"]
    arguments = data.get("init_args") or {}
    if "root" not in arguments:
        return []
    kind, root = data["class_path"].rpartition(".")[2], Path(arguments["root"])
    below = (arguments.get("test", "test"),) if kind == "FolderData" else TEST_FILES.get(kind, ("",))
    return [root / folder for folder in below]


def merge(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set a field by its dotted name, as a flag would: ``model.attack.gamma`` is ``model.init_args.attack.init_args.gamma``.

    A mapping with the same ``class_path`` is merged into what is there, any other value replaces it.

    Raises:
        KeyError: if the name leads through a plain value.

    Example:
        >>> settings = {"model": {"class_path": "Task", "init_args": {"attack": {"class_path": "GradMDM"}}}}
        >>> merge(settings, "model.attack.gamma", 3)
        >>> settings["model"]["init_args"]["attack"]
        {'class_path': 'GradMDM', 'init_args': {'gamma': 3}}
    """
    *groups, last = key.split(".")
    place = settings
    for number, name in enumerate([*groups, last]):
        if "class_path" in place and name not in ("class_path", "init_args", "dict_kwargs"):
            place = place.setdefault("init_args", {})
        if number == len(groups):
            break
        if place.get(name) is None:
            place[name] = {}
        place = place[name]
        if not isinstance(place, dict):
            raise KeyError(f"{'.'.join(groups[: number + 1])} is {place!r}, which has no fields")
    inherited = place.get(last)
    if isinstance(value, dict) and isinstance(inherited, dict) and inherited.get("class_path") in (None, value.get("class_path")):
        # A data fragment may have set the network's number of classes before there was a network.
        place[last] = {**value, "init_args": {**inherited.get("init_args", {}), **value.get("init_args", {})}}
    else:
        place[last] = value


def determining(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings without the fields of :data:`HARMLESS`; what is null counts as not given."""
    kept: dict[str, Any] = {}
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if key in HARMLESS or value is None:
            continue
        kept[name] = determining(value, f"{key}.") if isinstance(value, dict) else value
    return kept


def canonical(value: Any) -> str:
    """Plain values as one text: keys sorted, and 100.0 written like 100.

    Example:
        >>> canonical({"b": 100.0, "a": [0.5]})
        '{"a": [0.5], "b": 100}'
    """
    return json.dumps(_canonical(value), sort_keys=True, allow_nan=False)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read again only where it has changed."""
    state = path.stat()
    return _file_digest(path, state.st_mtime_ns, state.st_size)


@cache
def _file_digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as stream:
        # hashlib.file_digest is of Python 3.11.
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def data_digest(settings: Mapping[str, Any]) -> str | None:
    """SHA-256 of names and sizes of the test files; None for data that is embedded in a package.

    Contents are not read: ImageNet's would take minutes each time. Training images count only where the attack is fitted to them.
    """
    folders = image_folders(settings)
    if not folders:
        return None
    attack = settings["model"].get("init_args", {}).get("attack", {})
    if str(attack.get("class_path", "")).endswith("UniversalAttack"):
        folders = [Path(settings["data"]["init_args"]["root"])]
    classes = settings["data"]["init_args"].get("classes")
    parts = [folder_digest(folder) for folder in folders] + ([] if classes is None else [file_digest(Path(classes))])
    return hashlib.sha256("".join(parts).encode()).hexdigest()


@cache
def folder_digest(folder: Path) -> str:
    """SHA-256 of names and sizes of all files below a folder; looked at once, since a table asks for every row."""
    digest = hashlib.sha256()
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(place, name)
            digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()
