"""The report as a whole: what it says, that it repeats to the byte, and its tables and figures."""

from __future__ import annotations

import csv
import io
import math
import shutil
import sys

import pytest
from tests.reports.runs import SLOPE, write_run, write_sweep

from gatewatt.metrics.record import read_records
from gatewatt.reports import ReportError, collect, panels, report
from gatewatt.reports.figures import _psnr_ticks
from gatewatt.reports.tables import Table, figures_of, networks_table, one_decimal, same_attack_table


@pytest.fixture
def sweep(tmp_path):
    """Five methods in the paper's order, and one defended run of the strongest."""
    write_sweep(tmp_path / "sweep", {"GradMDM": 30.0, "Power": 28.0, "CGM": 26.0, "Eq6": 26.0, "Eq5": 27.0})
    write_run(tmp_path / "sweep" / "jpeg", offset=12.0, defense={"name": "JPEG", "quality": 75})
    return tmp_path / "sweep"


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_the_report_says_what_was_measured_and_what_came_out(sweep, tmp_path):
    written = report([sweep], tmp_path / "out", title="Sweep")
    assert [path.name for path in written] == [
        "RESULTS.md",
        "runs.csv",
        "matched.csv",
        "orderings.csv",
        "recovery-skipnet-38-digits.png",
        "recovery-skipnet-38-digits-jpeg-quality-75.png",
    ]
    assert all(path.stat().st_size > 0 for path in written)
    text = written[0].read_text()
    assert text.startswith("# Sweep\n")
    for words in (
        "## SkipNet-38 on digits, defense none, n = 200, seed 0",
        "Attacks: GradMDM, Power, CGM, Eq6, Eq5. Settings of all: steps=100.",
        "squared 8-bit levels",
        "1 MAC = 1 FLOP",
        "holds: GradMDM > Power, Power > CGM; ties: CGM > Eq6; is reversed: Eq6 > Eq5.",
        "![Recovery against MSE](recovery-skipnet-38-digits.png)",
        "Versions: gatewatt 0.1.",
    ):
        assert words in text
    assert str(tmp_path) not in text


def test_every_run_is_listed_with_figures_that_follow_from_its_records(sweep, tmp_path):
    report([sweep], tmp_path / "out", figures=False)
    lines = table(tmp_path / "out" / "runs.csv")
    assert len(lines) == 21
    for line in lines:
        rows = read_records(sweep.parent / line["run"] / "records.csv")
        saved = sum(row.flops_dense - row.flops_clean for row in rows)
        expected = {
            "images": 200,
            "recovery_percent": 100 * sum(row.flops_adversarial - row.flops_clean for row in rows) / saved,
            "recovery_8bit_percent": 100 * sum(row.flops_adversarial_8bit - row.flops_clean for row in rows) / saved,
            "mse_levels2": sum(row.mse_levels2 for row in rows) / 200,
            "psnr_db_of_mean_mse": 10 * math.log10(255**2 / (sum(row.mse_levels2 for row in rows) / 200)),
            "accuracy_clean_percent": 90,
            "accuracy_adversarial_percent": 50,
            "accuracy_adversarial_8bit_percent": 100,
            "routes_clean": 16,
        }
        assert {key: float(line[key]) for key in expected} == pytest.approx(expected, rel=1e-8)
        assert float(line["recovery_low"]) < float(line["recovery_percent"]) < float(line["recovery_high"])


def test_matched_values_in_the_csv_are_the_lines_of_the_methods(sweep, tmp_path):
    report([sweep], tmp_path / "out", figures=False)
    offsets = {"GradMDM": 30.0, "Power": 28.0, "CGM": 26.0, "Eq6": 26.0, "Eq5": 27.0}
    lines = [line for line in table(tmp_path / "out" / "matched.csv") if line["image"] == "float"]
    assert {line["method"] for line in lines} == set(offsets)
    for line in lines:
        expected = offsets[line["method"]] + SLOPE * math.log(float(line["mse_levels2"]))
        assert float(line["recovery_percent"]) == pytest.approx(expected, abs=1e-6)
    assert {line["image"] for line in table(tmp_path / "out" / "orderings.csv")} == {"float", "8bit"}


def test_the_same_runs_give_the_same_bytes_wherever_they_lie_and_in_whatever_order(sweep, tmp_path):
    first = report([sweep], tmp_path / "one", formats=("png", "svg"))
    shutil.copytree(sweep, tmp_path / "elsewhere" / "sweep")
    again = report([tmp_path / "elsewhere" / "sweep"], tmp_path / "two", formats=("png", "svg"))
    assert [path.name for path in first] == [path.name for path in again]
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name

    folders = sorted(path for path in sweep.iterdir())
    orders = [report(order, tmp_path / name, figures=False) for name, order in (("three", folders), ("four", folders[::-1]))]
    assert [path.read_bytes() for path in orders[0]] == [path.read_bytes() for path in orders[1]]


def test_a_report_replaces_an_earlier_one_and_leaves_the_runs_alone(sweep, tmp_path):
    before = {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()}
    report([sweep], tmp_path / "out", figures=False, title="Old")
    report([sweep], tmp_path / "out", figures=False, title="New")
    assert (tmp_path / "out" / "RESULTS.md").read_text().startswith("# New")
    assert {path: path.read_bytes() for path in sweep.rglob("*") if path.is_file()} == before


def test_networks_are_compared_under_the_same_attack(sweep):
    all_panels = panels(collect([sweep]))
    found = {run.name: figures_of(run) for panel in all_panels for run in panel.runs}
    same = [dict(zip(same_attack_table(all_panels, found).columns, row, strict=True)) for row in same_attack_table(all_panels, found).rows]
    assert [(line["attack"], line["defense"]) for line in same] == [
        ("GradMDM, gamma 1, steps=100", "none"),
        ("GradMDM, gamma 1, steps=100", "JPEG (quality=75)"),
    ]
    assert [line["recovery %"] for line in same] == pytest.approx([30 + SLOPE * math.log(3), 12 + SLOPE * math.log(3)])
    undefended, defended = (dict(zip(networks_table(all_panels, found).columns, row, strict=True)) for row in networks_table(all_panels, found).rows)
    assert undefended["runs"] == 20
    assert undefended["by"] == "GradMDM, gamma 0.01"
    assert 50 < undefended["clean FLOPs %"] < 60
    assert (defended["defense"], defended["remark"]) == ("JPEG (quality=75)", "-")


def test_static_and_nearly_full_networks_are_flagged(tmp_path):
    run = write_run(tmp_path / "run", images=20)
    (panel,) = panels(collect([run]))
    (only,) = panel.runs
    only.flops[:, 1] = 0.97 * only.flops[:, 0]
    only.flops[:, 2:] = only.flops[:, :1]
    object.__setattr__(only, "rows", tuple(type(row)(**(vars(row) | {"gates_clean": "0110"})) for row in only.rows))
    remark = networks_table([panel], {only.name: figures_of(only)}).rows[0][-1]
    assert "nearly full" in remark
    assert "static" in remark


def test_a_run_without_recovery_is_rendered_as_undefined(tmp_path):
    run = write_run(tmp_path / "run", images=5, mse=0.0)
    text = report([run], tmp_path / "out")[0].read_text()
    assert "| GradMDM | gamma 1 |" in text
    assert "undefined" in text  # the PSNR of unchanged images
    assert "nan" not in text.lower()
    assert "matched MSE, float" not in text


def test_a_report_without_matplotlib_says_so_before_writing_anything(sweep, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ReportError, match="figures need matplotlib"):
        report([sweep], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(report([sweep], tmp_path / "out", figures=False)) == 4


def test_an_unknown_format_is_refused(sweep, tmp_path):
    with pytest.raises(ReportError, match="formats must be among png, svg, got 'gif'"):
        report([sweep], tmp_path / "out", formats=["png", "gif"])
    assert not (tmp_path / "out").exists()


def test_cells_cannot_break_a_markdown_table():
    assert Table({"a": str, "b %": one_decimal}, (("x|y", -0.04), ("z", math.nan))).markdown() == (
        "| a | b % |\n| --- | --: |\n| x\\|y | 0.0 |\n| z | undefined |\n"
    )


@pytest.mark.parametrize(("low", "high"), [(0.01, 1000), (1, 2), (1e-6, 6e4), (3, 3.9)])
def test_psnr_ticks_stand_at_the_mse_they_name(low, high):
    ticks = _psnr_ticks(low, high)
    assert len(ticks) <= 9
    for mse, psnr in ticks:
        assert low * 0.999 <= mse <= high * 1.001
        assert psnr == pytest.approx(10 * math.log10(255**2 / mse))
