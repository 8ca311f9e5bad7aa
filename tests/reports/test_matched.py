"""Recovery at matched MSE and the paper's ordering, on runs whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.reports.runs import SLOPE, write_run, write_sweep

from gatewatt.reports import collect, match, panels
from gatewatt.reports.matched import round_values
from gatewatt.reports.tables import orderings_text


def panel_of(folder):
    (panel,) = panels(collect([folder]))
    return panel


def with_own_noise(panel, points=40.0):
    """Give every run noise of its own, of that many points per image: near 4 points of standard error in a difference over 200 images."""
    generator = np.random.default_rng(5)
    for run in panel.runs:
        saved = run.flops[:, 0] - run.flops[:, 1]
        scatter = generator.normal(0, points, len(saved))
        # Centred by saving, so that the recovery of all images together stays what it was.
        run.flops[:, 2] += saved * (scatter - (scatter * saved).sum() / saved.sum()) / 100
    return panel


def verdicts(matched, adjacent=True):
    return {(found.stronger, found.weaker, found.verdict) for found in matched.orderings if found.adjacent == adjacent}


def test_parallel_lines_give_their_offsets_and_the_paper_s_ordering(tmp_path):
    offsets = {"GradMDM": 30.0, "Power": 28.0, "CGM": 26.0, "Eq6": 25.0, "Eq5": 20.0}
    matched = match(panel_of(write_sweep(tmp_path, offsets)))
    assert matched.mse_levels2 == (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)[: len(matched.mse_levels2)] or len(matched.mse_levels2) >= 4
    for point in matched.points:
        # The noise is shared, and recovery is exact in log MSE: the interpolated value is the line itself.
        assert point.recovery_percent == pytest.approx(offsets[point.method] + SLOPE * math.log(point.mse_levels2), abs=1e-6)
        assert point.low < point.recovery_percent < point.high
    assert verdicts(matched) == {("GradMDM", "Power", "holds"), ("Power", "CGM", "holds"), ("CGM", "Eq6", "holds"), ("Eq6", "Eq5", "holds")}
    assert len(matched.orderings) == 10 * len(matched.mse_levels2)
    text = orderings_text(matched)
    assert "The whole ranking GradMDM > Power > CGM > Eq6 > Eq5 holds at MSE" in text


def test_a_tie_and_a_reversal_are_found(tmp_path):
    matched = match(panel_of(write_sweep(tmp_path, {"GradMDM": 25.0, "Power": 25.0, "CGM": 22.0, "Eq6": 24.0})))
    assert verdicts(matched) == {("GradMDM", "Power", "ties"), ("Power", "CGM", "holds"), ("CGM", "Eq6", "reversed")}
    assert ("GradMDM", "Eq6", "holds") in verdicts(matched, adjacent=False)
    text = orderings_text(matched)
    assert "ties: GradMDM > Power; is reversed: CGM > Eq6" in text
    assert f"holds at none of these MSE values (0 of {len(matched.mse_levels2)})" in text


def test_noise_that_is_not_shared_makes_a_small_lead_a_tie(tmp_path):
    panel = panel_of(write_sweep(tmp_path, {"GradMDM": 26.0, "Power": 25.0}))
    assert {found.verdict for found in match(panel).orderings} == {"holds"}
    assert {found.verdict for found in match(with_own_noise(panel)).orderings} == {"ties"}


def test_the_difference_s_interval_equals_a_paired_bootstrap_by_hand(tmp_path):
    panel = with_own_noise(panel_of(write_sweep(tmp_path, {"GradMDM": 26.0, "Eq5": 25.0})))
    matched = match(panel, mse_levels2=[3.0], draws=50, seed=9)
    generator = np.random.default_rng(9)
    by_method = {method: sorted(runs, key=lambda run: run.mse[:, 0].mean()) for method, runs in panel.methods.items()}
    differences = []
    for _ in range(50):
        drawn = generator.integers(0, 200, 200)
        recovered = {}
        for method, runs in by_method.items():
            x = [math.log(run.mse[drawn, 0].mean()) for run in runs]
            y = [100 * (run.flops[drawn, 2] - run.flops[drawn, 1]).sum() / (run.flops[drawn, 0] - run.flops[drawn, 1]).sum() for run in runs]
            recovered[method] = np.interp(math.log(3.0), x, y)
        differences.append(recovered["GradMDM"] - recovered["Eq5"])
    (found,) = matched.orderings
    # With shared noise every difference would be the same and the interval would not be tested at all.
    assert found.high - found.low > 5
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])), abs=1e-9)
    assert found.difference == pytest.approx(1.0, abs=1e-9)


def test_8bit_images_are_matched_by_their_own_figures(tmp_path):
    panel = panel_of(write_sweep(tmp_path, {"GradMDM": 30.0, "Eq5": 20.0}))
    matched = match(panel, image="8bit", mse_levels2=[3.083])
    line = SLOPE * math.log(3) - 1
    assert [point.recovery_percent for point in matched.points] == pytest.approx([30 + line, 20 + line], abs=1e-6)


def test_nothing_is_extrapolated(tmp_path):
    write_sweep(tmp_path / "a", {"GradMDM": 30.0})
    for gamma in (0.1, 1.0):
        write_run(tmp_path / f"b{gamma}", method="Eq5", gamma=gamma)
    panel = panel_of(tmp_path)
    assert all(3 <= value <= 30 for value in match(panel).mse_levels2)
    with pytest.raises(ValueError, match="outside 3 to 30"):
        match(panel, mse_levels2=[50])


def test_methods_without_a_common_range_a_line_or_a_partner_are_said_to_be_left_out(tmp_path):
    for gamma, mse in ((0.01, 1.0), (0.1, 2.0)):
        write_run(tmp_path / f"a{gamma}", method="GradMDM", gamma=gamma, mse=mse)
        write_run(tmp_path / f"b{gamma}", method="Power", gamma=gamma, mse=10 * mse)
    write_run(tmp_path / "c", method="Eq5", gamma=1.0)
    write_run(tmp_path / "d", method="Eq5", gamma=10.0, mse=0.0)
    matched = match(panel_of(tmp_path))
    assert matched.points == ()
    assert any("Eq5 is left out" in note and "it has 1" in note for note in matched.notes)
    assert "no two methods share an MSE range: GradMDM 1 to 2, Power 10 to 20" in matched.notes


def test_a_method_that_shares_no_range_with_the_others_leaves_them_comparable(tmp_path):
    def panel_with(name, **ends):
        for method, (low, high) in ends.items():
            write_run(tmp_path / name / f"{method}-low", method=method, gamma=1.0, mse=low)
            write_run(tmp_path / name / f"{method}-high", method=method, gamma=0.1, mse=high)
        return panel_of(tmp_path / name)

    others = {"GradMDM": (10, 100), "Power": (20, 200), "CGM": (1000, 10000), "Eq5": (900, 9000)}
    panel = panel_with("near", **others, Eq6=(25, 250))
    matched = match(panel)
    assert {point.method for point in matched.points} == {"GradMDM", "Power", "Eq6"}
    assert all(25 <= value <= 100 for value in matched.mse_levels2)
    said = "Eq5 is left out: its MSE values, 900 to 9e+03, share no range with those of the others"
    assert sorted(note.partition(" ")[0] for note in matched.notes) == ["CGM", "Eq5"]
    assert said in matched.notes
    with pytest.raises(ValueError, match="outside 25 to 100"):
        match(panel, mse_levels2=[950])
    # Of as many methods, those with more in common.
    assert {point.method for point in match(panel_with("wide", **others, Eq6=(25, 9000))).points} == {"CGM", "Eq5", "Eq6"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean_seed": 1}, "labels differ"),
        ({"ids": range(5, 205)}, "different images"),
    ],
)
def test_runs_that_are_not_on_the_same_images_are_not_compared(tmp_path, changes, message):
    write_sweep(tmp_path / "a", {"GradMDM": 30.0})
    write_run(tmp_path / "b", method="Eq5", **changes)
    matched = match(panel_of(tmp_path))
    assert matched.points == ()
    assert message in matched.notes[0]


def test_another_network_under_the_same_name_is_noticed(tmp_path):
    panel = panel_of(write_sweep(tmp_path, {"GradMDM": 30.0, "Eq5": 20.0}))
    panel.runs[1].flops[:3, 1] *= 0.9
    assert "clean FLOPs differ for 3 of 200 images" in match(panel).notes[0]
    assert match(panel).points == ()


def test_identical_runs_tie(tmp_path):
    matched = match(panel_of(write_sweep(tmp_path, {"GradMDM": 25.0, "Eq5": 25.0})))
    assert {(found.verdict, abs(found.difference) < 1e-9) for found in matched.orderings} == {("ties", True)}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.02, 3000, (0.1, 1.0, 10.0, 100.0, 1000.0)),
        (0.2, 40, (0.3, 1.0, 3.0, 10.0, 30.0)),
        (0.03, 1.0, (0.03, 0.1, 0.3, 1.0)),
        (4, 50, (5.0, 10.0, 20.0, 50.0)),
    ],
)
def testround_values_lie_inside_the_range(low, high, expected):
    assert round_values(low, high) == expected


def test_a_narrow_range_is_divided_evenly():
    values = round_values(4.0, 6.0)
    assert len(values) == 5
    assert 4 < values[0] < values[-1] < 6
    assert np.diff(np.log(values)) == pytest.approx(np.full(4, np.diff(np.log(values))[0]))
