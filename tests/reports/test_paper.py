"""Tables beside the paper's figures: intervals, marks, matched MSE, and pictures, from records whose answer is known."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from tests.reports.runs import DENSE, write_run

from gatewatt.metrics.estimates import bootstrap_interval
from gatewatt.reports import load_run
from gatewatt.reports.measures import CONSTANT, MEASURES, STANDARD_DEVIATIONS, measure, measured_text
from gatewatt.reports.paper import HALVES, NO_FIGURES, UNITS, Line, render_table
from gatewatt.reports.recipe import TableRecipe, read_table
from gatewatt.reports.subsets import Pair, choose
from gatewatt.reports.tables import figures_of

TABLE = """\
title: "Table 0: a small one"
claim: the second is stronger.
note: Nothing is known.
columns: [recovery_percent, mse_levels2, accuracy_adversarial_percent]
plot: PLOT
common: {checkpoint: some, paper: {dataset: ImageNet}}
rows:
  - label: first
    sweep: {model.attack.gamma: [0.1, 1, 10]}
    paper: {recovery_percent: 48.5, mse_levels2: 0.25}
  - label: second
    sweep: {model.attack.gamma: [0.1, 1, 10]}
    paper: {recovery_percent: 54, dataset: digits, network: SkipNet}
  - {label: third}
"""


def table_of(folder: Path, plot: str = "none", text: str = TABLE) -> TableRecipe:
    (folder / "t.yaml").write_text(text.replace("PLOT", plot))
    return read_table(folder / "t.yaml")


def lines_of(table: TableRecipe, folder: Path) -> list[Line]:
    """The first two rows measured, recovering 20 and 25 points at MSE 1, and a third that was not run."""
    lines = []
    for row, method, offset in zip(table.rows, ("Eq5", "GradMDM"), (20.0, 25.0), strict=False):
        for gamma in row.points:
            assert gamma is not None
            label = f"{row.label}, gamma {gamma:g}"
            run = load_run(write_run(folder / f"{method}-{gamma}", method=method, gamma=gamma, offset=offset), label)
            lines.append(Line(label, row, gamma, "key", run))
    return [*lines, Line("third", table.rows[2], reason="no checkpoint some")]


def test_figures_and_intervals_follow_from_the_records(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    found, expected = measure(run, MEASURES), figures_of(run)
    dense, clean, adversarial, _ = run.flops.T
    for key in (
        "recovery_percent",
        "recovery_8bit_percent",
        "recovery_per_image_percent",
        "psnr_db",
        "mse_levels2",
        "linf_levels",
        "flops_clean_percent",
    ):
        assert found[key].value == pytest.approx(getattr(expected, key)), key
    assert found["recovery_percent"][1:] == pytest.approx(bootstrap_interval(clean, adversarial, dense))
    accuracy = found["accuracy_adversarial_percent"]
    assert accuracy.value == pytest.approx(50)
    # Binomial: 1.96 standard errors of a share of a half over 200 images are 6.9 points.
    assert accuracy.high - accuracy.low == pytest.approx(13.9, abs=1.0)
    assert found["seconds_per_image"].value == pytest.approx(4.0 / 200)
    assert found["flops_dense"].value == DENSE
    assert all(math.isnan(found[key].low) for key in CONSTANT)
    # Digits have no known deviations.
    assert math.isnan(found["mse_standardised"].value)
    assert all(found[key].low <= found[key].value <= found[key].high for key in MEASURES if key not in (*CONSTANT, "mse_standardised"))


def test_a_standardised_mse_is_that_of_standardised_pixels(tmp_path: Path) -> None:
    from gatewatt.networks.layers import CIFAR_STD, IMAGENET_STD

    assert set(STANDARD_DEVIATIONS.values()) == {CIFAR_STD, IMAGENET_STD}
    run = load_run(write_run(tmp_path / "run", dataset="imagenet", mse=365.0))
    # An error of the same size in every channel, in levels: divided by 255 and by a channel's deviation before it is squared.
    levels = math.sqrt(365)
    expected = np.mean([(levels / 255 / one) ** 2 for one in IMAGENET_STD])
    found = measure(run, ["mse_standardised"])["mse_standardised"]
    assert found.value == pytest.approx(expected)
    assert found.value == pytest.approx(0.11, abs=5e-4)
    assert found.low <= found.value <= found.high
    digits = load_run(write_run(tmp_path / "digits"))
    assert measured_text("mse_standardised", measure(digits, ["mse_standardised"])["mse_standardised"]) == "undefined"


def halves_of(folder: Path) -> tuple[TableRecipe, list[Line]]:
    """Two methods on both subsets; on B everything recovers 5 points less than on A."""
    table = table_of(folder, text=TABLE.replace("common: {", "common: {subsets: true, ").replace("  - {label: third}\n", ""))
    lines = []
    for row in table.rows:
        for gamma in row.points:
            assert gamma is not None
            label = f"{row.label}, gamma {gamma:g}"
            method, other = ("Eq5", 0.0) if row.method == "first" else ("GradMDM", 5.0)
            ids = np.arange(200) + 200 * (row.subset == "B")
            offset = 20.0 + other - 5.0 * (row.subset == "B")
            run = write_run(folder / label, method=method, gamma=gamma, offset=offset, ids=ids, clean_seed=int(row.subset == "B"))
            lines.append(Line(label, row, gamma, "key", load_run(run, label)))
    return table, lines


def test_what_is_chosen_on_a_keeps_to_the_mse_and_is_reported_on_b(tmp_path: Path) -> None:
    table, lines = halves_of(tmp_path)
    text = render_table(table, lines, tmp_path / "out", figures=False).markdown
    assert f"- {HALVES}\n" in text
    # Each subset is compared within itself.
    assert [text.count(f"n = 200, seed 0, subset {subset}\n") for subset in "AB"] == [2, 2]
    assert "different images" not in text
    assert text.count("| second > first | holds (+5.0) |") == 4
    section = text.partition("### Chosen on subset A")[2].partition("###")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| ")]
    header, found = rows[0], [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
    assert header == ["MSE allowed", "method", "chosen on A", "recovery % on A", "recovery % on B", "MSE on A", "MSE on B"]
    assert len(found) >= 8
    for row in found:
        # MSE 30, 3 and 0.3 belong to gamma 0.1, 1 and 10; the largest allowed recovers most.
        gamma, mse = next((gamma, mse) for gamma, mse in (("0.1", 30.0), ("1", 3.0), ("10", 0.3)) if mse <= float(row["MSE allowed"]))
        assert row["chosen on A"] == f"gamma {gamma}"
        assert float(row["MSE on A"].split()[0]) == pytest.approx(mse, rel=0.01)
        on_a, on_b = (float(row[f"recovery % on {subset}"].split()[0]) for subset in "AB")
        assert on_a - on_b == pytest.approx(5.0, abs=0.11)


def test_the_choice_does_not_look_at_subset_b(tmp_path: Path) -> None:
    runs = {
        (gamma, subset): load_run(write_run(tmp_path / f"{gamma}{subset}", gamma=gamma, mse=1.0, offset=offset))
        for gamma, subset, offset in ((0.1, "A", 30.0), (1.0, "A", 20.0), (0.1, "B", 5.0), (1.0, "B", 90.0))
    }
    (choice,) = choose({"only": [Pair(runs[gamma, "A"], runs[gamma, "B"]) for gamma in (0.1, 1.0)]})
    assert choice.pair.chosen_on.attack.strength == (("gamma", 0.1),)
    assert choice.allowed == pytest.approx(1.0)


def test_a_run_that_is_missing_on_one_subset_takes_no_part_in_the_choice(tmp_path: Path) -> None:
    table, lines = halves_of(tmp_path)
    text = render_table(table, [line for line in lines if line.row.subset == "A"], tmp_path / "out", figures=False).markdown
    assert "Chosen on subset A" not in text


def test_what_is_undefined_is_said_so(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", mse=0.0))
    assert measured_text("psnr_db", measure(run, ["psnr_db"])["psnr_db"]) == "undefined"
    run.flops[:, 1:] = run.flops[:, :1]
    for key in ("recovery_percent", "recovery_per_image_percent"):
        assert measured_text(key, measure(run, [key])[key]) == "undefined"


def test_the_page_says_what_was_measured_and_marks_the_paper_s_figures(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    text = render_table(table, lines_of(table, tmp_path), tmp_path / "out", figures=False).markdown
    for words in (
        "## Table 0: a small one\n",
        "The paper: the second is stronger.\n",
        "- Nothing is known.\n",
        "- n = 200 test images a run, seed 0.\n",
        "- Attacks: Eq5, GradMDM. Settings of all: steps=100.",
        "95 % bootstrap intervals in brackets (2000 resamples)",
        f"- {UNITS}\n",
        "1 of 7 runs have no records",
        "48.5 (paper: ImageNet)",
        "not run: no checkpoint some",
    ):
        assert words in text, words
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| second, gamma")]
    # The same data set needs no mark; the paper's figure is not that of any one point, and stands once.
    assert [row[6] for row in rows] == ["54", "-", "-"]
    assert [row[8] for row in rows] == ["SkipNet", "-", "-"]
    assert "[" in rows[0][3]


def test_rows_that_sweep_are_compared_at_equal_mse_under_their_own_labels(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    text = render_table(table, lines_of(table, tmp_path), tmp_path / "out", figures=False).markdown
    assert text.count("### At equal MSE, float images: SkipNet-38 on digits") == 1
    assert text.count("### At equal MSE, 8-bit images") == 1
    assert "| MSE | PSNR dB | second | first |" in text
    assert "| second > first | holds (+5.0) |" in text
    alone = [line for line in lines_of(table, tmp_path / "again") if line.row.label != "first"]
    assert "At equal MSE" not in render_table(table, alone, tmp_path / "out", figures=False).markdown
    # More steps are no other strength.
    steps = table_of(tmp_path, text=TABLE.replace("model.attack.gamma", "times_steps"))
    assert "At equal MSE" not in render_table(steps, lines_of(steps, tmp_path / "steps"), tmp_path / "out", figures=False).markdown


def test_the_csv_holds_every_line_with_its_intervals(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    render_table(table, lines_of(table, tmp_path), tmp_path / "out", figures=False)
    found = list(csv.DictReader((tmp_path / "out" / "t.csv").read_text().splitlines()))
    assert [line["row"] for line in found] == ["first"] * 3 + ["second"] * 3 + ["third"]
    assert [line["point"] for line in found] == ["0.1", "1", "10"] * 2 + [""]
    for line in found[:6]:
        assert float(line["recovery_percent_low"]) < float(line["recovery_percent"]) < float(line["recovery_percent_high"])
        assert line["settings"].endswith("steps=100")
        assert line["settings"].startswith("gamma=")
    assert found[3]["paper_recovery_percent"] == "54"
    assert found[3]["paper_dataset"] == "digits"
    assert found[6]["status"] == "not run: no checkpoint some"


def test_a_table_without_figures_of_the_paper_says_so(tmp_path: Path) -> None:
    table = table_of(
        tmp_path, text=TABLE.replace("    paper: {recovery_percent: 48.5, mse_levels2: 0.25}\n", "").replace("recovery_percent: 54, ", "")
    )
    assert [row.paper for row in table.rows] == [None, None, None]
    assert NO_FIGURES in render_table(table, [Line("third", table.rows[2], reason="why")], tmp_path, figures=False).markdown


@pytest.mark.parametrize("plot", ["recovery-mse", "bars", "steps", "gates", "flops", "images"])
def test_every_plot_is_drawn_and_repeats_to_the_byte(plot: str, tmp_path: Path) -> None:
    table = table_of(tmp_path, plot)
    lines = lines_of(table, tmp_path)
    if plot == "images":
        generator = np.random.default_rng(0)
        clean = generator.uniform(size=(2, 3, 8, 8)).astype(np.float32)
        flops = {"flops_clean": np.full(2, 40.0), "flops_adversarial": np.full(2, 80.0), "flops_dense": np.full(2, 100.0)}
        np.savez(tmp_path / "strip.npz", ids=np.arange(2), clean=clean, adversarial=clean[:, :, ::-1], **flops)
        lines = [Line(line.label, line.row, line.point, line.key, line.run, tmp_path / "strip.npz") for line in lines[:1]]
    drawn = [render_table(table, lines, tmp_path / name) for name in ("one", "two")]
    (first,), (second,) = ([file for file in section.files if file.suffix == ".png"] for section in drawn)
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 5000
    assert f"]({first.name})" in drawn[0].markdown
