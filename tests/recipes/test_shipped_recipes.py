"""Every shipped recipe opens with the command that runs it, and that command is accepted as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from gatewatt.cli import main
from gatewatt.shipped import shipped_folder

# Tables are no runs themselves; tests/cli/test_shipped_tables.py has them.
RECIPES = sorted(path for path in shipped_folder("recipes").rglob("*.yaml") if path.parent.name != "tables")
NAMES = [path.relative_to(shipped_folder("recipes")).as_posix() for path in RECIPES]


def command(path: Path) -> list[str]:
    """The first command of a recipe's header."""
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    found = re.search(r"^#\s+gatewatt (.*)$", header, re.MULTILINE)
    assert found, f"{path} does not say which command runs it"
    return shlex.split(found[1])


def test_there_are_recipes_for_every_part() -> None:
    assert {"task", "network", "data", "attack", "trainer"} <= {Path(name).parts[0] for name in NAMES}
    assert "quickstart.yaml" in NAMES


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_command_in_the_header_names_the_recipe(path: Path) -> None:
    name = path.relative_to(shipped_folder("recipes")).with_suffix("").as_posix()
    arguments = [argument.removeprefix("recipes/").removesuffix(".yaml") for argument in command(path)]
    assert name in arguments


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_command_in_the_header_is_accepted(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *rest = command(path)
    if verb == "price":
        # The law does not depend on the resolution, and a small one is quick to trace.
        assert main([verb, *rest, "--size", "32"]) == 0
        return
    assert main([verb, *rest, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].startswith("gatewatt.tasks.")
    assert printed["model"]["init_args"]["network"]["init_args"]["num_classes"] > 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipes_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
