"""Completion scripts: small, whole, and right about what they offer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from gatewatt.cli import HELP, main
from gatewatt.cli.completion import FLAGS, SHELLS
from gatewatt.shipped import shipped


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_small_and_names_every_verb_and_recipe(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert len(text) < 30_000
    assert all(verb in text for verb in HELP)
    assert all(name in text for name in shipped("recipes", ".yaml"))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_accepted_by_its_shell(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    (tmp_path / "script").write_text(script(shell, capsys))
    subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, capture_output=True)


def test_fish_offers_recipes_and_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("there is no fish here")
    (tmp_path / "script").write_text(script("fish", capsys))
    for typed, offered in (("fit -c quick", "quickstart"), ("audit --checkpoint dvt-small", "dvt-small-digits")):
        command = f"source {tmp_path / 'script'}; complete -C 'gatewatt {typed}'"
        answer = subprocess.run(["fish", "-c", command], check=True, capture_output=True, text=True, env={**os.environ, "HOME": str(tmp_path)})
        assert [line.split("\t")[0] for line in answer.stdout.splitlines()] == [offered]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["gatewatt", ""], {*HELP, "--help", "--version"}),
        (["gatewatt", "pr"], {"predict", "price"}),
        (["gatewatt", "fit", "--resume", ""], {"auto"}),
        (["gatewatt", "fit", "-c", "quick"], {"quickstart"}),
        (["gatewatt", "fit", "-c", "own"], {"own.yaml"}),
        (["gatewatt", "price", "--checkpoint", "skipnet-38-cifar10-hrl-r"], {"skipnet-38-cifar10-hrl-robust"}),
        (["gatewatt", "audit", "--pat"], {"--patterns"}),
        (["gatewatt", "report", "ru"], {"runs"}),
        (["gatewatt", "report", "--no"], {"--no-figures", "--no-run"}),
        (["gatewatt", "report", "tables/table04"], {"tables/table04", "tables/table04-long"}),
        (["gatewatt", "completion", ""], set(SHELLS)),
    ],
)
def test_bash_offers_what_can_follow(words: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("there is no bash here")
    (tmp_path / "runs").mkdir()
    (tmp_path / "own.yaml").touch()
    quoted = " ".join(f"'{word}'" for word in words)
    ask = f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _gatewatt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    (tmp_path / "ask").write_text(script("bash", capsys) + ask)
    answer = subprocess.run(["bash", "ask"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert set(answer.stdout.split()) == offered


@pytest.mark.parametrize("verb", FLAGS)
def test_the_flags_offered_exist(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    if verb in ("fit", "validate", "test", "predict"):
        assert main([verb, "--help-all"]) == 0
        text += capsys.readouterr().out
    # Fields of a task or a data set depend on its class.
    flags = [flag for flag in FLAGS[verb] if not flag.startswith(("--data.", "--model."))]
    assert [flag for flag in flags if flag not in text] == []


def test_another_shell_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert capsys.readouterr().err == "gatewatt: error: completion needs one of bash, zsh, fish, such as: gatewatt completion bash\n"
