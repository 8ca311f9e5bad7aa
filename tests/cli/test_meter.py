"""The verbs price and audit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gatewatt.cli import main, meter
from gatewatt.defenses import BudgetGuard, described
from gatewatt.flops import price
from gatewatt.networks import SkipNet
from gatewatt.networks.checkpoint import save

SMALL = """\
model:
  init_args:
    network:
      class_path: gatewatt.networks.SkipNet
      init_args: {depth: 8, num_classes: 10, width: 4}
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(SMALL)


def figures(text: str) -> dict[str, int]:
    """First column -> MACs of a printed price table."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line.startswith("│")]
    return {row[0]: int(row[3].replace(",", "")) for row in rows}


def test_prices_are_the_ledger_s_and_add_up(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["price", "-c", "small.yaml", "--size", "16"]) == 0
    text = capsys.readouterr().out
    printed, ledger = figures(text), price(SkipNet(8, width=4).eval(), torch.rand(1, 3, 16, 16))
    assert {name: macs for name, macs in printed.items() if "." in name} == ledger.prices
    assert printed["everything open"] == ledger.dense
    assert printed["everything closed"] == ledger.fixed == printed["always computed"] + printed["the gates themselves"]
    assert printed["everything open"] == printed["everything closed"] + sum(ledger.prices.values())
    assert "1 FLOP = 1 multiply-accumulate" in text


def test_units_stand_beside_the_gates_that_have_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["price", "--model.network", "gatewatt.networks.ManiDP", "--model.network.depth", "8", "--model.network.width", "4"]) == 0
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row[:3] for row in rows if row[0].startswith("blocks.1.")] == [
        ["blocks.1.conv_a", "block1.mask1", "8"],
        ["blocks.1.conv_b", "block1.mask1 x block1.mask2", "8 x 8"],
    ]


def test_flags_change_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["price", "-c", "small.yaml", "--model.network.depth", "14"]) == 0
    assert "trunk.blocks.5.residual" in figures(capsys.readouterr().out)


def test_a_checkpoint_is_priced_without_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(SkipNet(8, width=4), tmp_path / "tiny.safetensors", card={})
    assert main(["price", "--checkpoint", "tiny.safetensors"]) == 0
    assert figures(capsys.readouterr().out)["everything open"] == price(SkipNet(8, width=4).eval(), torch.rand(1, 3, 32, 32)).dense


def test_an_audit_of_own_and_forced_decisions_agrees(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "-c", "small.yaml", "--images", "3", "--patterns", "4", "--size", "16"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r"\d of \d", line)]
    assert len(lines) == 5
    assert all("3 of 3" in line and "4 of 4" in line for line in lines)


def test_an_audit_uses_the_data_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "-c", "small.yaml", "-c", "data/digits", "--images", "2", "--patterns", "0"]) == 0
    assert "2 of 2" in capsys.readouterr().out
    assert main(["audit", "-c", "small.yaml", "-c", "data/digits", "--images", "500"]) == 2
    assert capsys.readouterr().err == "gatewatt: error: --images: images must be at most 400, the size of the test set, got 500\n"


def test_an_audit_counts_behind_the_defense_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["audit", "-c", "network/skipnet-20-small", "-c", "defense/guard", "--model.defense.budget", "0.5", "--images", "3", "--patterns", "3"])
        == 0
    )
    text = capsys.readouterr().out
    most = next(line for line in text.splitlines() if "most MACs of a pass" in line)
    dense = price(SkipNet(20, width=8), torch.zeros(1, 3, 32, 32)).dense
    assert max(int(cell.replace(",", "")) for cell in most.split("│")[2:4]) <= 0.5 * dense


def test_a_checkpoint_is_measured_behind_what_it_was_trained_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guarded = BudgetGuard(SkipNet(8, width=4).eval(), 0.7)
    with torch.no_grad():
        guarded.network.gating.projection.bias.fill_(9.0)  # type: ignore[union-attr, operator]
    save(guarded.network, tmp_path / "tiny.safetensors", card={"defense": described(guarded)})

    def most(*flags: str) -> tuple[int, str]:
        assert main(["audit", "--checkpoint", "tiny.safetensors", "--images", "2", "--patterns", "0", *flags]) == 0
        text = capsys.readouterr().out
        line = next(line for line in text.splitlines() if "most MACs of a pass" in line)
        return int(line.split("│")[2].replace(",", "")), text.splitlines()[0]

    dense = price(guarded, torch.zeros(1, 3, 32, 32)).dense
    capped, said = most()
    assert capped <= guarded.certificate < dense
    assert said == "tiny.safetensors was trained behind BudgetGuard and is measured behind it; --bare true: the network inside"
    open_wide, said = most("--bare", "true")
    assert open_wide == dense
    assert "trained behind" not in said


def test_one_difference_fails_an_audit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    true = meter.compare_routes
    calls = iter(range(10))
    monkeypatch.setattr(meter, "compare_routes", lambda *given: true(*given)._replace(traced=1) if next(calls) == 3 else true(*given))
    assert main(["audit", "-c", "small.yaml", "--images", "2", "--patterns", "3", "--size", "16"]) == 1
    text = capsys.readouterr().out
    assert "2 of 3" in text
    assert "1 of 5 passes disagree; the first is pass 3: Routes(ledger=" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["price"], "no network is given"),
        (["price", "--checkpoint", "nowhere"], "nowhere"),
        (["price", "-c", "small.yaml", "--size", "0"], "--size: "),
        (["audit", "-c", "small.yaml", "--images", "-1"], "--images: "),
        (["audit", "-c", "small.yaml", "--images", "0", "--patterns", "0"], "images and patterns are both 0"),
        (["price", "-c", "small.yaml", "--model.network.depth", "9"], "depth must be 6n + 2"),
        (["price", "-c", "small.yaml", "--model.network.depht", "8"], "did you mean depth?"),
        (["price", "-c", "small.yaml", "--images", "8"], "unrecognized arguments: --images 8"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("gatewatt: error: ")
    assert err.count("\n") == 1
