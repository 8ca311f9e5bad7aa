"""The latency page: every family is timed by one command, and the table says what the files say."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType

import pytest

from gatewatt.shipped import shipped_folder

pytestmark = pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")


@pytest.fixture
def skipped(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which finds its neighbours as it does from the command line."""
    monkeypatch.syspath_prepend(str(shipped_folder("recipes").parent / "benchmarks"))
    return importlib.import_module("skipped")


def test_a_checkpoint_is_timed_and_the_table_rendered(skipped: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["shallow-deep-resnet-20-digits", "manidp-20-digits"]
    arguments = ["--batches", "2", "--rounds", "2", "--out", str(tmp_path / "skipped")]
    skipped.main(["--checkpoints", *names, "skipnet-38-cifar10", *arguments])
    assert "skipnet-38-cifar10: left out, its images need --data FOLDER" in capsys.readouterr().out
    page = (tmp_path / "skipped" / "SKIPPED.md").read_text()
    for name in names:
        with (tmp_path / "skipped" / f"{name}.csv").open(newline="") as stream:
            lines = list(csv.DictReader(stream))
        assert [(line["checkpoint"], line["batch"], line["passes"], line["images"]) for line in lines] == [(name, "2", "16", "32")] * 2
        assert all(float(line[f"{execution}_ms"]) > 0 for line in lines for execution in ("dense", "skipped", "masked"))
        assert 0 < float(lines[0]["flops_fraction"]) < 1
        assert page.count(f"`{name}`") == 1


def test_ratios_are_those_of_rounds_and_a_page_without_files_is_refused(skipped: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint was measured"):
        skipped.render(tmp_path)
    shared = {"checkpoint": "x", "batch": 8, "passes": 4, "images": 32, "flops_fraction": 0.25, "machine": "none"}
    times = [(10.0, 5.0, 11.0), (20.0, 5.0, 22.0), (40.0, 30.0, 44.0)]
    lines = [{**shared, "dense_ms": dense, "skipped_ms": fast, "masked_ms": slow} for dense, fast, slow in times]
    skipped.write(tmp_path / "x.csv", lines)
    # Medians: 20 and 5 ms, but of the ratios 0.5, 0.25 and 0.75 the middle one is 0.5.
    assert skipped.rows_of(tmp_path / "x.csv") == [["`x`", "8", "25.0 %", "20.00", "5.00", "0.50", "1.10", "3"]]
    assert "| `x` | 8 | 25.0 % | 20.00 | 5.00 | 0.50 | 1.10 | 3 |" in skipped.render(tmp_path)


def test_too_few_images_for_a_batch_are_an_error(skipped: ModuleType) -> None:
    with pytest.raises(ValueError, match="sact-20-digits has only 400 test images at hand, fewer than a batch of 500"):
        skipped.measure("sact-20-digits", None, 500, 1)
