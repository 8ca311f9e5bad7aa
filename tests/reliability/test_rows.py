"""Every row of RELIABILITY.md holds: in a few trials here, in the promised number under ``-m slow``."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import reliability
from benchmarks.promises.base import NotMeasured, Outcome
from benchmarks.reliability import ROWS, function

SLOW_EVEN_WHEN_SMALL = {
    4: "two dozen short runs",
    5: "file systems of its own, and a dozen runs",
    15: "two processes that import everything, four times",
}
"""Rows whose small version takes more than some seconds; why."""
ORDINARY = [row for row in ROWS if row not in SLOW_EVEN_WHEN_SMALL]


def check(row: int, count: int, folder: Path) -> None:
    try:
        # Tests judge no seconds: whoever runs them may be busy.
        outcome: Outcome = function(row)(count, folder, **({"timed": False} if row in (7, 16) else {}))
    except NotMeasured as reason:
        pytest.skip(str(reason))
    assert outcome.failures == ()
    assert outcome.kept
    assert outcome.held >= min(count, 1)


@pytest.mark.parametrize("row", ORDINARY)
def test_a_promise_holds_in_a_few_trials(row: int, tmp_path: Path) -> None:
    check(row, ROWS[row].small, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("row", SLOW_EVEN_WHEN_SMALL)
def test_a_costly_promise_holds_in_a_few_trials(row: int, tmp_path: Path) -> None:
    check(row, ROWS[row].small, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@pytest.mark.parametrize("row", ROWS)
def test_a_promise_holds_as_often_as_promised(row: int, tmp_path: Path) -> None:
    check(row, ROWS[row].full, tmp_path)


@pytest.mark.parametrize("digits", [0.0, 0.01])
def test_a_card_is_compared_with_a_second_validation(digits: float, tmp_path: Path) -> None:
    """Row 13 on a copy of a shipped checkpoint, with its true card and with one that promises too much."""
    from benchmarks.promises.cards import copied, validated
    from gatewatt.networks.checkpoint import amend_card, card_of
    from gatewatt.shipped import find_checkpoint

    copy = copied(find_checkpoint("shallow-deep-resnet-20-digits"), tmp_path)
    validation = card_of(copy)["validation"]
    amend_card(copy, validation={**validation, "val/accuracy": validation["val/accuracy"] + digits})
    assert ("val/accuracy" in (validated(copy, [], tmp_path) or "")) == bool(digits)


def test_a_card_is_compared_with_a_second_measurement(tmp_path: Path) -> None:
    """Row 13 on a small checkpoint of its own, first with its true card and then with a false one."""
    import json

    import torch

    from benchmarks.promises.base import finish
    from benchmarks.promises.cards import compared
    from gatewatt.networks import SkipNet
    from gatewatt.networks.checkpoint import amend_card, save

    torch.manual_seed(2)
    weights = tmp_path / "tiny.safetensors"
    save(SkipNet(8, width=4), weights, card={})
    (tmp_path / "card.yaml").write_text("""\
extends: [task/attack, data/digits]
model:
  init_args:
    network: {class_path: gatewatt.networks.SkipNet, init_args: {depth: 8, num_classes: 10, width: 4}}
    attack: {class_path: gatewatt.attacks.GradMDM, init_args: {steps: 2}}
data: {init_args: {test_images: 12}}
trainer:
  accelerator: cpu
  enable_progress_bar: false
  callbacks: [{class_path: gatewatt.callbacks.ResultFiles, init_args: {into_card: true}}]
""")
    recipe = [str(tmp_path / "card.yaml")]
    assert finish(["test", "-c", *recipe, "--model.checkpoint", str(weights), "--run", "first"], tmp_path, tmp_path / "first.log") == 0
    assert compared(weights, recipe, tmp_path) is None
    measured = json.loads(weights.with_suffix(".json").read_text())["measured"]
    amend_card(weights, measured={**measured, "accuracy_clean": measured["accuracy_clean"] + 0.01})
    assert "accuracy_clean" in (compared(weights, recipe, tmp_path) or "")


def test_the_table_says_what_held_and_what_did_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "PAGE", tmp_path / "RELIABILITY.md")
    monkeypatch.setattr(reliability, "RESULTS", tmp_path)
    reliability.PAGE.write_text(f"above\n{reliability.BEGIN}\nstale\n{reliability.END}\nbelow\n")
    monkeypatch.setattr(reliability, "function", lambda row: lambda count, folder: Outcome(count - 1, count, "a note", ("the last one",)))
    import json

    record = reliability.measure(10, 1000)
    assert (record["kept"], record["held"], record["of"], record["failures"]) == (False, 999, 1000, ["the last one"])
    (tmp_path / "row-10.json").write_text(json.dumps(record))
    reliability.render()
    page = reliability.PAGE.read_text()
    assert page.startswith("above\n")
    assert page.endswith("below\n")
    assert "stale" not in page
    assert "**999** | 1000 | full" in page
    assert "first failure: the last one" in page
    assert page.count("not run yet") == len(ROWS) - 1
    first = page
    reliability.render()
    assert reliability.PAGE.read_text() == first
