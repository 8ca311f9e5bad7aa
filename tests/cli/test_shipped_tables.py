"""Every shipped table recipe is read, and every row of it is a recipe that ``gatewatt test`` accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gatewatt.cli import main, rows
from gatewatt.cli.errors import leaves
from gatewatt.cli.rows import Options, compose
from gatewatt.reports.recipe import TableRecipe, read_table
from gatewatt.shipped import find_checkpoint, shipped

NAMES = [name for name in shipped("recipes", ".yaml") if name.startswith("tables/")]
FAMILIES = {name.partition("-")[0]: name for name in shipped("checkpoints", ".safetensors")}
TABLES = [f"tables/table{number:02}" for number in range(1, 15)]
FIGURES = [f"tables/figure{name}" for name in ("1a", "1bc", "2a", "2b", "2c")]


@pytest.fixture
def everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """Folders of every data set, and another checkpoint of the family for one that is not shipped."""

    def stand_in(name: str) -> Path:
        known = name in FAMILIES.values()
        return find_checkpoint(name if known else FAMILIES[name.partition("-")[0]])

    monkeypatch.setattr(rows, "checkpoint_file", stand_in)
    for below in ("test", "val", "cifar-100-python"):
        (tmp_path / below).mkdir()
    return Options(roots=dict.fromkeys(rows.ROOTED, tmp_path))


def test_there_is_a_recipe_for_every_table_and_figure() -> None:
    assert sorted(NAMES) == sorted([*TABLES, *FIGURES, "tables/table04-long", "tables/subsets"])


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_read_and_says_what_it_rests_on(name: str) -> None:
    table = read_table(name)
    assert table.rows
    text = table.path.read_text()
    assert text.startswith("# ")
    assert f"#   gatewatt report recipes/{name}.yaml --data.root " in text
    # A table whose number our sources do not give says so at its head too.
    assert (table.numbering == "inferred") == ("inferred" in text.splitlines()[0])


def settings_of(table: TableRecipe, options: Options) -> list[dict[str, object]]:
    return [compose(table, row, row.points[0], options).settings for row in table.rows]


@pytest.mark.parametrize("name", NAMES)
def test_every_row_composes_and_compares_at_no_equal_gamma_alone(name: str, everything: Options) -> None:
    table = read_table(name)
    assert len(settings_of(table, everything)) == len(table.rows)
    assert "mse_levels2" in table.columns
    # The unit of the paper's MSE is open: where it is quoted, ours stands beside it in both.
    if any(row.paper is not None and "mse_levels2" in row.paper.figures for row in table.rows):
        assert "mse_standardised" in table.columns


def test_tables_that_name_no_other_data_set_are_of_checkpoints_that_a_shipped_recipe_trains() -> None:
    trained = set(shipped("recipes", ".yaml")) | set(shipped("checkpoints", ".safetensors"))
    for name in NAMES:
        for row in read_table(name).rows:
            # No weights of CIFAR-100 and CUB-200 are trained by a recipe of their own.
            if row.data not in ("imagenet", "cifar100", "cub200"):
                assert {row.checkpoint, row.source or row.checkpoint} <= trained, (name, row.label)


def test_the_trainer_accepts_every_kind_of_row(
    everything: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: set[str] = set()
    for name in NAMES:
        for settings in settings_of(read_table(name), everything):
            # Rows of one kind differ in numbers; a kind is a set of fields and classes.
            kind = {f"{'.'.join(key)}={value if key[-1] == 'class_path' else ''}" for key, value in leaves(settings)}
            if kind <= seen:
                continue
            seen |= kind
            Path("row.yaml").write_text(json.dumps(settings))
            assert main(["test", "-c", "row.yaml", "--print_config"]) == 0, (name, capsys.readouterr().err)
    assert len(seen) > 40
