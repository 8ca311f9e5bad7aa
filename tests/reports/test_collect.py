"""Finding and loading runs, and refusing in one line whatever does not add up."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.reports.runs import write_run

from gatewatt.reports import ReportError, collect, find_runs, load_run, panels
from gatewatt.reports.collect import describe


def edit(folder, **changes):
    """Change keys of a summary; None as the whole value removes the key."""
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in summary.items() if value != "REMOVE"}))


def test_runs_are_found_at_any_depth_once_and_named_by_their_place(tmp_path):
    for place in ("sweep/b/run", "sweep/a", "single"):
        write_run(tmp_path / place, images=3)
    found = find_runs([tmp_path / "sweep", tmp_path / "single", tmp_path / "sweep" / "a"])
    assert list(found) == ["single", "sweep/a", "sweep/b/run"]
    assert [run.name for run in collect([tmp_path / "sweep"])] == ["sweep/a", "sweep/b/run"]


def test_runs_of_one_name_in_two_places_stay_apart(tmp_path):
    for place in ("one/run", "two/run"):
        write_run(tmp_path / place, images=3)
    assert list(find_runs([tmp_path / "one/run", tmp_path / "two/run"])) == ["run", "run (2)"]


def test_names_do_not_depend_on_how_the_path_is_spelled(tmp_path, monkeypatch):
    write_run(tmp_path / "sweep" / "a", images=3)
    monkeypatch.chdir(tmp_path / "sweep")
    assert list(find_runs(["."])) == list(find_runs([tmp_path / "sweep"])) == list(find_runs(["../sweep"]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: edit(run, psnr_db="REMOVE", seed="REMOVE"), "missing keys seed, psnr_db"),
        (lambda run: edit(run, seed="REMOVE"), "missing key seed"),
        (lambda run: (run / "summary.json").write_text('{"a": 1,'), "not valid JSON.*line 1"),
        (lambda run: (run / "summary.json").write_text("[]"), "must hold a mapping, got list"),
        (lambda run: (run / "summary.json").write_bytes(b"\xff\xfe"), "not a text file"),
        (lambda run: edit(run, images="many"), "images must be a whole number"),
        (lambda run: edit(run, images=21), "records.csv: 20 rows, but summary.json counts 21 images"),
        (lambda run: edit(run, recovery_percent=99.0), "recovery_percent is 99.0, but the rows .* not of one run"),
        (lambda run: edit(run, recovery_percent=None), "recovery_percent is None"),
        (lambda run: edit(run, mse_levels2="small"), "mse_levels2 is 'small'"),
        (lambda run: (run / "records.csv").unlink(), "incomplete, records.csv is missing"),
        (lambda run: (run / "summary.json").unlink(), "incomplete, summary.json is missing"),
        (lambda run: (run / "records.csv").write_text((run / "records.csv").read_text().replace("\n3,", "\n4,")), "doubled 4"),
        (lambda run: (run / "records.csv").write_text((run / "records.csv").read_text().replace("\n3,", "\nx,")), "line 5, column 'id'"),
        (lambda run: shutil.rmtree(run), "no such folder"),
    ],
)
def test_a_run_that_does_not_add_up_is_refused_in_one_line_that_names_the_file(tmp_path, damage, message):
    run = write_run(tmp_path / "run", images=20)
    damage(run)
    with pytest.raises(ReportError, match=message) as caught:
        collect([run])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(run))


def test_nothing_to_report_is_an_error(tmp_path):
    with pytest.raises(ReportError, match="no run below it"):
        find_runs([tmp_path])
    with pytest.raises(ReportError, match="no paths given"):
        find_runs([])


def test_part_of_a_split_is_a_run_too(tmp_path):
    assert load_run(write_run(tmp_path / "run", images=4, ids=[9, 3, 5, 100])).ids == (3, 5, 9, 100)


def test_panels_keep_apart_what_cannot_be_compared(tmp_path):
    write_run(tmp_path / "a", images=3)
    write_run(tmp_path / "b", images=3, gamma=0.1)
    write_run(tmp_path / "c", images=4)
    write_run(tmp_path / "d", images=3, seed=1)
    write_run(tmp_path / "e", images=3, defense={"name": "JPEG", "quality": 75})
    write_run(tmp_path / "f", images=3, network={"name": "SkipNet", "depth": 38, "checkpoint": "runs/x/last.safetensors"})
    write_run(tmp_path / "g", images=3, network={"name": "SkipNet", "depth": 74, "checkpoint": "elsewhere/x/last.safetensors"})
    found = panels(collect([tmp_path]))
    name = tmp_path.name
    assert [(panel.network, panel.defense, [run.name.removeprefix(f"{name}/") for run in panel.runs]) for panel in found] == [
        ("SkipNet-38", "none", ["b", "a"]),
        ("SkipNet-38", "none", ["c"]),
        ("SkipNet-38", "none", ["d"]),
        ("SkipNet-38", "JPEG (quality=75)", ["e"]),
        ("x/last", "none", ["g"]),
        ("x/last", "none", ["f"]),
    ]


def test_methods_are_ranked_as_in_the_paper_and_told_apart_by_differing_settings_only(tmp_path):
    for index, (method, steps) in enumerate([("Other", 100), ("Eq5", 100), ("Eq5", 300), ("Power", 100), ("GradMDM", 100)]):
        settings = {"steps": steps, "space": {"kind": "Tanh"}, "source": None}
        write_run(tmp_path / str(index), method=method, images=3, settings=settings)
    (panel,) = panels(collect([tmp_path]))
    assert list(panel.methods) == ["GradMDM", "Power", "Eq5 [steps=100]", "Eq5 [steps=300]", "Other"]
    assert panel.runs[0].attack == ("GradMDM", (("gamma", 1.0),), (("space.kind", "Tanh"), ("steps", "100")))


def test_a_sweep_over_a_ball_is_one_line(tmp_path):
    for eps in (4, 8):
        write_run(tmp_path / str(eps), images=3, settings={"space": {"kind": "LinfBall", "eps": eps / 255}})
    (panel,) = panels(collect([tmp_path]))
    assert list(panel.methods) == ["GradMDM"]
    assert [dict(run.attack.strength)["eps"] for run in panel.runs] == [4 / 255, 8 / 255]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"),
        ("JPEG", "JPEG"),
        (3, "3"),
        ({"name": "JPEG", "quality": 75, "unused": None}, "JPEG (quality=75)"),
        ({"class_path": "gatewatt.defenses.JPEG", "init_args": {"quality": 75}}, "JPEG (quality=75)"),
        ({"class_path": "gatewatt.defenses.JPEG"}, "JPEG"),
    ],
)
def test_entries_read_as_names(value, text):
    assert describe(value) == text


def test_links_to_a_run_do_not_count_it_twice(tmp_path):
    write_run(tmp_path / "runs" / "a", images=3)
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "a")
    assert len(find_runs([tmp_path / "runs", tmp_path / "link"])) == 1
