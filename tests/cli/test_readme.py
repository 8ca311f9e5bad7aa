"""Every command of the README is accepted as it stands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gatewatt.cli import main

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text() if README.exists() else ""
COMMANDS = sorted(set(re.findall(r"\bgatewatt ((?:fit|validate|test|predict|price)\b[^#`|\n&]*-c [^#`|\n&]*)", TEXT)))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_accepted(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)
    assert main(arguments if arguments[0] == "price" else [*arguments, "--print_config"]) == 0
    assert list(tmp_path.iterdir()) == []
