"""The house of DESIGN.md, kept: imports point downwards, and each heavy library has its rooms."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "gatewatt"

FLOORS = {
    "gating": 0,
    "networks": 1,
    "flops": 1,
    "objectives": 2,
    "attacks": 2,
    "defenses": 2,
    "metrics": 2,
    "data": 2,
    "tasks": 3,
    "callbacks": 3,
    "diagnosis": 3,
    "reports": 4,
    "cli": 5,
    "__main__": 6,
}
# Finding and merging files needs no torch; help and completion stay quick because these import nothing else. Nor does a constant of all floors.
PLAIN = ("files", "recipes", "rounding", "shipped")
STRANGERS = [{"networks", "flops"}, {"objectives", "attacks", "defenses", "metrics", "data"}]
"""Rooms of one floor that never import each other."""
# A callback watches a task and may know its type; a task never knows who watches it.
NEIGHBOURS = {("callbacks", "tasks")}
"""(room, room of the same floor that it may enter)."""

ROOMS = {
    "lightning": {"data", "tasks", "callbacks", "cli"},
    "fvcore": {"flops"},
}


class Import(NamedTuple):
    """One import: where it stands, the room it stands in, and the full name of what it brings."""

    place: str
    room: str
    target: str

    @property
    def room_entered(self) -> str | None:
        """The room of gatewatt that the import enters, if it enters one."""
        parts = self.target.split(".")
        return parts[1] if parts[0] == "gatewatt" and len(parts) > 1 and parts[1] in {*FLOORS, *PLAIN} else None


def imports_in(source: str, room: str, place: str = "example.py", package: tuple[str, ...] = ("gatewatt",)) -> list[Import]:
    """Every import of a file, also those inside functions; ``from a import b`` counts as ``a.b``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            targets = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        else:
            continue
        found += [Import(f"{place}:{node.lineno}", room, target) for target in targets]
    return found


def rooms() -> Iterator[tuple[str, Path]]:
    """Every file of the package and the room it belongs to; the package's own ``__init__`` stands above all floors."""
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        if not path.parts[0].startswith("_") or path.stem == "__main__":
            yield path.parts[0].removesuffix(".py"), file


@cache
def all_imports() -> list[Import]:
    found = []
    for room, file in rooms():
        path = file.relative_to(PACKAGE)
        found += imports_in(file.read_text(), room, str(path), ("gatewatt", *path.parts[:-1]))
    return found


def climbs(imported: Import) -> bool:
    """Whether an import leaves its room for one that does not lie below."""
    room, entered = imported.room, imported.room_entered
    if entered is None or entered == room or entered in PLAIN or (room, entered) in NEIGHBOURS:
        return False
    return room in PLAIN or FLOORS[entered] >= FLOORS[room]


def test_every_part_of_the_package_has_a_floor() -> None:
    assert {room for room, _ in rooms()} <= {*FLOORS, *PLAIN}


def test_the_sources_are_found() -> None:
    assert {"gating", "networks", "flops"} <= {imported.room for imported in all_imports()}


def test_imports_point_downwards() -> None:
    assert [imported for imported in all_imports() if climbs(imported)] == []


def test_the_package_itself_is_imported_for_its_version_alone() -> None:
    # gatewatt/__init__.py hands out names of every floor, so importing one from there would point upwards out of sight.
    own = [imported for imported in all_imports() if imported.target.split(".")[0] == "gatewatt" and imported.room_entered is None]
    assert [imported for imported in own if imported.target not in ("gatewatt", "gatewatt.__version__")] == []


@pytest.mark.parametrize("library", ROOMS)
def test_a_heavy_library_stays_in_its_rooms(library: str) -> None:
    users = [imported for imported in all_imports() if imported.target.split(".")[0] == library]
    assert [user for user in users if user.room not in ROOMS[library]] == []


def test_lightning_is_imported_under_its_own_name() -> None:
    # Both distributions may be installed, and their classes are not each other's.
    assert [imported for imported in all_imports() if imported.target.split(".")[0] == "pytorch_lightning"] == []


@pytest.mark.parametrize(("room", "allowed"), [("gating", {"torch"}), *((room, {"yaml"}) for room in PLAIN)])
def test_the_ground_floor_stands_on_little(room: str, allowed: set[str]) -> None:
    outside = {imported.target.split(".")[0] for imported in all_imports() if imported.room == room}
    assert outside <= {*sys.stdlib_module_names, "gatewatt", *allowed}


def test_reports_read_files_and_never_a_model() -> None:
    models = ("networks", "flops", "attacks", "defenses", "tasks", "callbacks")
    assert [imported for imported in all_imports() if imported.room == "reports" and imported.room_entered in models] == []


@pytest.mark.parametrize("strangers", STRANGERS)
def test_strangers_stand_on_one_floor(strangers: set[str]) -> None:
    # That is what keeps them apart: an import of one's own floor already counts as climbing.
    assert len({FLOORS[room] for room in strangers}) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("gating", "from gatewatt.networks import SkipNet"),
        ("gating", "import gatewatt.flops.ledger"),
        ("networks", "from gatewatt.flops import price"),
        ("flops", "from gatewatt import networks"),
        ("attacks", "def late():\n    from gatewatt.defenses.base import InputDefense"),
        ("attacks", "from ..objectives import Objective"),
        ("metrics", "from gatewatt.tasks.train import DynamicTraining"),
        ("tasks", "from gatewatt.callbacks import RecordWriter"),
        ("shipped", "from gatewatt.gating import Gate"),
    ],
)
def test_a_climbing_import_is_caught(room: str, source: str) -> None:
    assert any(climbs(imported) for imported in imports_in(source, room, package=("gatewatt", room)))


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("networks", "from gatewatt.gating import Gate"),
        ("networks", "from . import layers\nfrom .resnet import ResNet\nfrom gatewatt.shipped import find_checkpoint"),
        ("cli", "from gatewatt.tasks import DynamicTraining"),
        ("attacks", "import torch\nfrom gatewatt import __version__"),
    ],
)
def test_a_descending_import_is_fine(room: str, source: str) -> None:
    assert not any(climbs(imported) for imported in imports_in(source, room, package=("gatewatt", room)))
