"""The verb doctor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gatewatt.cli import main
from gatewatt.networks import SkipNet
from gatewatt.networks.checkpoint import save

QUICK = ["--images", "12", "--steps", "2", "--eps", "0.2"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    network = SkipNet(8, width=4)
    with torch.no_grad():
        network.gating.projection.bias.fill_(50.0)  # type: ignore[union-attr,operator]
    save(network, tmp_path / "open.safetensors", card={"dataset": "digits"})


def test_an_honest_network_is_believed_on_the_data_of_its_card(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--checkpoint", "dvt-small-digits", *QUICK, "--run", "mine"]) == 0
    text = capsys.readouterr().out
    assert "verdict: believable" in text
    assert "12 images of digits (linf 0.2, 2 steps)" in text
    written = json.loads(Path("runs/mine/diagnosis.json").read_text())
    assert written["checkpoint"] == "dvt-small-digits"
    assert written["settings"] | {"images": 12, "steps": 2, "eps": 0.2} == written["settings"]
    assert written["data"]["class_path"] == "gatewatt.data.DigitsData"
    assert len(written["checks"]) == 14


def test_gates_that_never_close_are_told_with_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--checkpoint", "open.safetensors", "--images", "60", "--source", "open.safetensors"]) == 1
    text = capsys.readouterr().out
    assert "verdict: not believable: clean saving (the gates save too little" in text
    written = json.loads(Path("runs/doctor-open/diagnosis.json").read_text())
    assert not written["believable"]
    assert written["source_checkpoint"] == "open.safetensors"
    assert [check["name"] for check in written["checks"] if check["outcome"] == "fail"] == ["clean saving", "gates vary", "routes differ"]


def test_a_network_is_examined_behind_the_defense_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-c", "defense/guard", "--checkpoint", "open.safetensors", *QUICK, "--model.defense.budget", "0.6"]) == 1
    assert "open behind BudgetGuard on 12 images of digits" in capsys.readouterr().out
    written = json.loads(Path("runs/doctor-open/diagnosis.json").read_text())
    assert (written["defense"]["name"], written["defense"]["budget"]) == ("BudgetGuard", 0.6)
    # Without the guard every gate is open.
    saving = next(check for check in written["checks"] if check["name"] == "clean saving")
    assert saving["outcome"] == "pass"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor"], "no network is given"),
        (["doctor", "-c", "network/skipnet-20-small"], "no data is given"),
        (["doctor", "--checkpoint", "nowhere"], "nowhere"),
        (["doctor", "--checkpoint", "open.safetensors", "--images", "500"], "there are 400"),
        (["doctor", "--checkpoint", "open.safetensors", "--images", "0"], "--images: "),
        (["doctor", "--checkpoint", "open.safetensors", "--norm", "l1"], "--norm: "),
        (["doctor", "--checkpoint", "open.safetensors", "--images", "4", "--eps", "2"], "eps must be above 0 and below 1"),
        (["doctor", "--checkpoint", "open.safetensors", "--patterns", "4"], "unrecognized arguments: --patterns 4"),
        (["doctor", "-c", "network/skipnet-20-small", "-c", "data/digits", "--model.network.num_classes", "7"], "the data digits has 10 classes"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("gatewatt: error: ")
    assert err.count("\n") == 1
    assert not Path("runs").exists()
