"""report of table recipes: what is missing is run once, what was interrupted again, and mistakes are one line."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.tables import TABLE, Trainer, report

from gatewatt.cli import main, rows, trainer


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.yaml").write_text(TABLE)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A trainer that writes known records."""
    made = Trainer()
    monkeypatch.setattr(trainer, "run", made)
    return made


def lines(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_a_second_call_runs_nothing_and_writes_the_same_bytes(fake: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("t.yaml", "-o", "one") == 0
    assert fake.gammas == [0.1, 1, 10]
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["one/t.md", "one/t.csv"]
    first, second = captured.err.splitlines()[:2]
    assert first == "gatewatt: t: elsewhere: left out, no checkpoint nowhere-at-all"
    assert second.startswith("gatewatt: t: swept, gamma 0.1 (run 1 of 3, results/")
    assert report("t.yaml", "-o", "two") == 0
    assert fake.gammas == [0.1, 1, 10]
    assert {name: Path("one", name).read_bytes() for name in ("t.md", "t.csv")} == {
        name: Path("two", name).read_bytes() for name in ("t.md", "t.csv")
    }


def test_another_table_shares_the_runs_it_has_in_common(fake: Trainer) -> None:
    assert report("t.yaml") == 0
    Path("u.yaml").write_text(TABLE.replace("[0.1, 1]", "[1, 0.01]").replace("label: swept", "label: other"))
    assert report("u.yaml") == 0
    assert fake.gammas == [0.1, 1, 10, 0.01]


def test_two_tables_of_one_call_run_a_common_row_once_and_share_a_page(fake: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    Path("u.yaml").write_text(TABLE)
    assert report("t.yaml", "u.yaml", "--title", "Both") == 0
    assert fake.gammas == [0.1, 1, 10]
    assert capsys.readouterr().out.splitlines() == ["report/RESULTS.md", "report/t.csv", "report/u.csv"]
    page = Path("report/RESULTS.md").read_text()
    assert page.startswith("# Both\n")
    assert page.count("## Table 0: a small one\n") == 2
    assert page.count("Units and definitions:") == 1


def test_what_was_found_stands_below_what_the_paper_says(fake: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    Path("results").mkdir()
    found = Path("results/findings.yaml")
    found.write_text("t: >-\n  It holds,\n  at a large error.\n")
    assert report("t.yaml") == 0
    page = Path("report/t.md").read_text()
    claim, here = "The paper: nothing of it.\n", "Here: It holds, at a large error.\n"
    assert f"{claim}\n{here}" in page
    found.write_text("u: of a table that is there as well\n")
    Path("u.yaml").write_text(TABLE)
    assert report("t.yaml") == 0
    assert Path("report/t.md").read_text() == page.replace(f"{here}\n", "")
    capsys.readouterr()
    for text, message in [("v: of no table\n", "there is no table of that name; there are t, u"), ("\nt: [1]\n", "t: must be a text")]:
        found.write_text(text)
        assert report("t.yaml") == 2
        error = capsys.readouterr().err
        assert f"findings.yaml:{text.count(chr(10))}: " in error
        assert message in error
    assert fake.gammas == [0.1, 1, 10]


def test_an_interrupted_table_goes_on_with_the_run_that_was_cut_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    killed = Trainer(fails_at=2)
    monkeypatch.setattr(trainer, "run", killed)
    assert report("t.yaml") == 130
    assert killed.gammas == [0.1, 1]
    assert not Path("report").exists()
    again = Trainer()
    monkeypatch.setattr(trainer, "run", again)
    assert report("t.yaml") == 0
    assert again.gammas == [1, 10]
    assert all((folder / "key.json").is_file() for folder in Path("results").iterdir())


def test_a_run_that_another_report_holds_is_left_to_it_and_waited_for(fake: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    assert report("t.yaml") == 0
    (folder,) = (Path("results") / line["key"] for line in lines("report/t.csv") if line["point"] == "0.1")
    shutil.rmtree("results")
    Path("results").mkdir()
    # The other report is a process of its own: it holds the first run, and ends when the third has been started.
    with subprocess.Popen([sys.executable, "-c", OTHER, str(folder), "results"], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        fake.gammas.clear()
        capsys.readouterr()
        assert report("t.yaml", "-o", "again") == 0
    assert other.returncode == 0
    assert fake.gammas == [1, 10, 0.1]
    first, *_ = capsys.readouterr().err.splitlines()[1:]
    assert first.startswith("gatewatt: t: swept, gamma 0.1 (run 1 of 3, results/")
    assert first.endswith(" is being run by another report")
    assert {file.suffix for file in Path("results").iterdir()} == {""}


OTHER = """
import sys, time
from pathlib import Path
from filelock import FileLock

with FileLock(sys.argv[1] + ".lock"):
    print("held", flush=True)
    while len(list(Path(sys.argv[2]).glob("*/key.json"))) < 2:
        time.sleep(0.05)
"""


def test_a_run_whose_mark_is_missing_is_made_again(fake: Trainer) -> None:
    assert report("t.yaml") == 0
    (folder,) = (Path("results") / line["key"] for line in lines("report/t.csv") if line["point"] == "1")
    (folder / "key.json").unlink()
    assert report("t.yaml") == 0
    assert fake.gammas == [0.1, 1, 10, 1]


def test_steps_and_images_are_for_a_short_run_and_keep_their_records_apart(fake: Trainer) -> None:
    assert report("t.yaml", "--steps", "5", "--images", "7", "--seed", "3") == 0
    assert {line["images"] for line in lines("report/t.csv")} == {"7", ""}
    assert {line["seed"] for line in lines("report/t.csv")} == {"3", ""}
    keys = {folder.name for folder in Path("results").iterdir()}
    identity = json.loads((Path("results") / min(keys) / "key.json").read_text())
    assert identity["recipe"]["model"]["init_args"]["attack"]["init_args"]["steps"] == 5
    assert report("t.yaml") == 0
    assert len(fake.gammas) == 6
    assert keys < {folder.name for folder in Path("results").iterdir()}


def test_a_row_that_cannot_be_run_says_why_and_leaves_the_others(fake: Trainer) -> None:
    assert report("t.yaml") == 0
    page = Path("report/t.md").read_text()
    assert "| elsewhere | - | - | - | - | - | not run: no checkpoint nowhere-at-all |" in page
    assert "1 of 4 runs have no records; the remark says why." in page
    assert [line["status"] for line in lines("report/t.csv")] == ["measured"] * 3 + ["not run: no checkpoint nowhere-at-all"]


def test_a_folder_of_tables_is_a_page_of_what_has_been_measured(fake: Trainer) -> None:
    Path("tables").mkdir()
    for name in ("a", "b"):
        shutil.copy("t.yaml", f"tables/{name}.yaml")
    assert report("tables") == 0
    assert fake.gammas == []
    assert Path("report/RESULTS.md").read_text().count("not run: no records yet; gatewatt report with the table's own file runs it") == 6
    assert report("t.yaml") == 0
    assert report("tables") == 0
    assert len(fake.gammas) == 3
    assert "no records yet" not in Path("report/RESULTS.md").read_text()
    shutil.rmtree("results")
    assert report("t.yaml", "--no-run") == 0
    assert len(fake.gammas) == 3


def test_a_page_is_made_of_records_of_older_code_and_says_so_but_a_report_runs_them_anew(fake: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report("t.yaml") == 0
    page = Path("report/t.md").read_text()
    assert report("t.yaml", "--no-run") == 0
    assert Path("report/t.md").read_text() == page
    monkeypatch.setattr(rows, "code_digest", lambda settings: "changed")
    assert report("t.yaml", "--no-run") == 0
    said = "- 3 of 3 runs were measured by code that has changed since.\n"
    assert Path("report/t.md").read_text() == page.replace("- 1 of 4 runs", f"{said}- 1 of 4 runs")
    assert {line["key"] for line in lines("report/t.csv")[:3]} == {path.name for path in Path("results").iterdir()}
    assert fake.gammas == [0.1, 1, 10]
    assert report("t.yaml") == 0
    assert fake.gammas == [0.1, 1, 10] * 2
    # Those of both versions serve, each for its own.
    assert report("t.yaml", "--no-run") == 0
    assert Path("report/t.md").read_text() == page
    monkeypatch.setattr(rows, "code_digest", lambda settings: "changed again")
    assert report("t.yaml", "--no-run") == 0
    assert Path("report/t.md").read_text().count("not run: there are several records of it, ") == 3
    mark = next(Path("results").glob("*/key.json"))
    mark.write_text("{}")
    assert report("t.yaml", "--no-run") == 2


def test_a_dry_run_lists_and_counts_what_a_report_would_run_and_runs_nothing(fake: Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    Path("u.yaml").write_text(TABLE.replace("[0.1, 1]", "[1, 0.01]").replace("label: swept", "label: other"))
    assert report("t.yaml") == 0
    capsys.readouterr()
    assert report("t.yaml", "u.yaml", "--dry-run") == 0
    captured = capsys.readouterr()
    assert fake.gammas == [0.1, 1, 10]
    assert captured.err == ""
    head, *rows = captured.out.splitlines()
    # Both tables want gamma 1 and Eq. 5; of u, gamma 0.01 alone is new: 20 images times 10 steps.
    assert head == "t: 3 runs, 3 recorded, 0 to run (0 image-steps), 2 needed by other tables too"
    assert [row.split("  ", 3)[1] for row in rows[:3]] == ["recorded"] * 3
    assert rows[3] == "u: 3 runs, 2 recorded, 1 to run (200 image-steps), 2 needed by other tables too"
    assert rows[5].startswith("  to run    ")
    assert rows[5].endswith("  other, gamma 0.01, 20 images x 10 steps")
    assert rows[7:] == [
        "t: elsewhere: left out, no checkpoint nowhere-at-all",
        "u: elsewhere: left out, no checkpoint nowhere-at-all",
        "all: 4 runs, 3 recorded, 1 to run (200 image-steps)",
    ]
    assert report("u.yaml") == 0
    assert fake.gammas == [0.1, 1, 10, 0.01]


def test_a_row_on_both_subsets_shares_its_records_on_a_with_an_ordinary_row(fake: Trainer) -> None:
    assert report("t.yaml") == 0
    Path("u.yaml").write_text(TABLE.replace("label: swept", "label: swept\n    subsets: true"))
    assert report("u.yaml") == 0
    assert fake.gammas == [0.1, 1, 10, 0.1, 1]
    offsets = {}
    for line in lines("report/u.csv")[:4]:
        identity = json.loads((Path("results") / line["key"] / "key.json").read_text())
        offsets[line["label"]] = identity["recipe"]["data"]["init_args"].get("test_offset")
    assert offsets == {
        "swept, subset A, gamma 0.1": None,
        "swept, subset A, gamma 1": None,
        "swept, subset B, gamma 0.1": 20,
        "swept, subset B, gamma 1": 20,
    }


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        (TABLE.replace("mse_levels2]", "mse]"), [], "t.yaml:3: columns: there is no column 'mse'; did you mean mse_levels2?"),
        (TABLE.replace(", mse_levels2]", "]"), [], "t.yaml:3: columns: a recovery says nothing without the size of the change; add mse_levels2"),
        (TABLE.replace("plot: recovery-mse", "plot: pie"), [], "t.yaml:4: plot: must be one of none, recovery-mse, bars,"),
        (TABLE.replace("steps: 10", "steps: 0"), [], "t.yaml:6: steps: must be a whole number of 1 or more, got 0"),
        (TABLE.replace("claim", "clame"), [], "t.yaml:2: clame: there is no such key in a table recipe; did you mean claim?"),
        (TABLE.replace("label: swept", "lable: swept"), [], "t.yaml:9: rows.0.lable: there is no such key in a table recipe; did you mean label?"),
        (TABLE.replace("label: swept", "label: Eq. 5"), [], "label: 'Eq. 5' is the label of two rows"),
        (TABLE.replace("dataset: ImageNet", "network: SkipNet"), [], "paper: needs dataset"),
        (TABLE.replace("attack/eq5", "attack/eq55"), [], "no recipe 'attack/eq55'"),
        (TABLE.replace("label: swept", "label: swept\n    subsets: both"), [], "subsets: must be true or false, got 'both'"),
        (TABLE.replace("[0.1, 1]", "3"), [], "sweep: must be one field with a list of values"),
        (TABLE.replace("sweep: {model", "fields: {data.name.x: 1}, sweep: {model"), [], "t.yaml:10: not valid YAML"),
        (TABLE, ["--steps", "0"], "--steps: must be a whole number of 1 or more, got 0"),
        (TABLE, ["--data.root", "mnist=x"], "--data.root: must be a folder, or NAME=FOLDER with NAME among cifar10, cifar100"),
        (TABLE, ["--data.root"], "--data.root needs a value"),
        (TABLE, ["--color"], "report has no option --color"),
        (TABLE, ["--model.attack.gama", "3"], "swept, gamma 0.1: "),
        (TABLE, ["--seed_everything.x", "3"], "t.yaml:9: seed_everything.x: seed_everything is 0, which has no fields"),
        (TABLE, ["runs"], "runs is no table recipe, others are"),
    ],
)
def test_mistakes_are_one_line(text: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.yaml").write_text(text)
    assert report("t.yaml", *arguments) == 2
    err = capsys.readouterr().err.splitlines()
    assert message in err[-1]
    assert err[-1].startswith("gatewatt: error: ")
    assert [line for line in err[:-1] if not line.startswith(("gatewatt: t: swept", "gatewatt: t: elsewhere: left out, "))] == []
    assert not Path("report").exists()


def test_options_of_tables_are_refused_for_run_folders(capsys: pytest.CaptureFixture[str]) -> None:
    for option, *value in (["--steps", "3"], ["--dry-run"]):
        assert main(["report", "runs", option, *value]) == 2
        assert capsys.readouterr().err == f"gatewatt: error: {option} is for table recipes; runs is none\n"
    assert main(["report", "tables/table99"]) == 2
    assert "no recipe 'tables/table99'" in capsys.readouterr().err


SMALL = """\
title: "Figure 0: images"
claim: nothing of it.
columns: [recovery_percent, recovery_8bit_percent, mse_levels2, psnr_db, accuracy_adversarial_percent, seconds_per_image]
plot: images
strip: 2
images: 6
steps: 3
common: {checkpoint: dvt-small-digits, recipes: [attack/gradmdm], fields: {trainer.accelerator: cpu, trainer.enable_progress_bar: false}}
rows:
  - {label: one, fields: {model.attack.gamma: 1}}
  - {label: other, fields: {model.attack.gamma: 100}}
  - {label: halves, subsets: true, fields: {model.attack.gamma: 1}}
"""


def test_a_small_table_from_nothing_to_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.yaml").write_text(SMALL)
    assert main(["report", "t.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[-3:] == ["report/t.md", "report/t.csv", "report/t.png"]
    measured = lines("report/t.csv")
    assert [(line["label"], line["status"], line["images"], line["dataset"]) for line in measured] == [
        ("one", "measured", "6", "digits"),
        ("other", "measured", "6", "digits"),
        ("halves, subset A", "measured", "6", "digits"),
        ("halves, subset B", "measured", "6", "digits"),
    ]
    on_a, other, on_a_again, on_b = ({row["id"] for row in lines(f"results/{line['key']}/records.csv")} for line in measured)
    assert on_a == other == on_a_again
    assert len(on_b) == 6
    assert not on_a & on_b
    assert measured[0]["key"] == measured[2]["key"]
    assert float(measured[0]["mse_levels2"]) > 0
    assert {file.name for file in Path("results").rglob("*.npz")} == {"strip.npz"}
    # The second row ran after another network in this process; alone, as a test run of its own, it gives the same records to the last bit.
    again = Path("results") / measured[1]["key"] / "recipe.yaml"
    assert main(["test", "-c", str(again), "--run", "alone/again"]) == 0
    assert Path("alone/again/records.csv").read_bytes() == again.with_name("records.csv").read_bytes()
