"""The dispatcher: quick answers, verbs, and the recipes of a command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gatewatt.cli import HELP, main, split_recipes

SOURCE = Path(__file__).parents[2] / "src"


QUICK = {
    "": 0,
    "--help": 0,
    "--version": 0,
    "fit --help": 0,
    "nothing": 2,
    "fit -c nowhere": 2,
    "report --help": 0,
    "report": 2,
    "report nowhere": 2,
    "report nowhere --title": 2,
    "report nowhere --color": 2,
    "completion bash": 0,
    "completion": 2,
    "-- --version": 0,
    "test --help": 0,
}
"""Command line -> exit code."""


@pytest.mark.parametrize("line", QUICK)
def test_quick_answers_do_not_wait_for_torch(line: str) -> None:
    arguments, code = line.split(), QUICK[line]
    script = (
        f"import sys; sys.path.insert(0, {str(SOURCE)!r})\n"
        "from gatewatt.cli import main\n"
        f"code = main({arguments!r})\n"
        "heavy = {'torch', 'lightning', 'jsonargparse', 'fvcore'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(code)\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == code, answer.stderr
    assert answer.stderr.count("\n") == (1 if code else 0)
    assert bool(answer.stdout) == (not code)


@pytest.mark.parametrize("verb", HELP)
def test_every_verb_has_a_short_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: gatewatt {verb}")
    assert len(text.splitlines()) < 20


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_the_full_help_lists_every_field(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help-all"]) == 0
    assert "--trainer.max_epochs" in capsys.readouterr().out


def test_an_unknown_verb_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == f"gatewatt: error: no verb 'trian'; it must be one of {', '.join(HELP)}\n"


def test_recipes_are_taken_out_wherever_they_stand() -> None:
    assert split_recipes(["--run", "x", "-c", "a", "--config", "b", "--config=c", "--k=v"]) == (["a", "b", "c"], ["--run", "x", "--k=v"])


def test_the_module_runs_as_the_command_does() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "gatewatt", "--version"], capture_output=True, text=True, timeout=120, check=True, env={"PYTHONPATH": str(SOURCE)}
    )
    assert answer.stdout.startswith("gatewatt ")
