"""The key of a row: what determines a record changes it, and nothing else does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gatewatt.cli import code, rows
from gatewatt.cli.code import bare_code
from gatewatt.cli.rows import NotRun, Options, compose, merge, plan
from gatewatt.recipes import load_recipes
from gatewatt.reports.recipe import read_table
from gatewatt.shipped import find_checkpoint

TABLE = """\
title: Small
claim: nothing.
columns: [recovery_percent, mse_levels2]
images: 30
steps: 2
rows:
  - label: one
    checkpoint: weights.safetensors
    source: source.safetensors
    recipes: [attack/gradmdm]
    fields: {model.attack.gamma: 3}
"""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows.folder_digest.cache_clear()
    for name in ("weights", "source"):
        copy_checkpoint(tmp_path / f"{name}.safetensors")
    make_images(tmp_path / "data")


def copy_checkpoint(target: Path, name: str = "dvt-small-digits") -> None:
    for suffix in (".safetensors", ".json"):
        shutil.copy(find_checkpoint(name).with_suffix(suffix), target.with_suffix(suffix))


def make_images(root: Path) -> None:
    """Files where images would be: a key looks at names and sizes alone."""
    (root / "test" / "cat").mkdir(parents=True)
    (root / "test" / "cat" / "1.png").write_bytes(b"12345")


def key(text: str = TABLE, *, strip: bool = False, **changes: object) -> str:
    Path("t.yaml").write_text(text)
    table = read_table("t.yaml")
    options = Options(**{"roots": {"cifar10": Path("data")}, **changes})  # type: ignore[arg-type]
    rows.folder_digest.cache_clear()
    return plan(table, table.rows[0], table.rows[0].points[0], options, strip=strip).key


ON_FILES = TABLE.replace("source: source.safetensors", "data: cifar10")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gamma: 3", "gamma: 4"),
        ("attack/gradmdm", "attack/eq6"),
        ("[attack/gradmdm]", "[attack/gradmdm, defense/jpeg]"),
        ("images: 30", "images: 31"),
        ("steps: 2", "steps: 3"),
        ("    source: source.safetensors\n", ""),
        ("gamma: 3}", "gamma: 3, trainer.precision: bf16-mixed}"),
        ("gamma: 3}", "gamma: 3, data.split_seed: 1}"),
        ("gamma: 3}", "gamma: 3}\n    times_steps: 2"),
        ("gamma: 3}", "gamma: 3}\n    sweep: {model.attack.gamma: [5]}"),
    ],
)
def test_what_determines_a_record_changes_the_key(old: str, new: str) -> None:
    assert key(TABLE.replace(old, new)) != key()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"steps": 3}, {"images": 10}, {"fields": {"model.attack.lr": 0.5}}, {"strip": True}])
def test_the_command_line_counts_as_the_recipe_does(changes: dict[str, object]) -> None:
    assert key(**changes) != key()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("images: 30", "# why\nimages: 30 # so many"),
        ("gamma: 3", "gamma: 3.0"),
        ("label: one", "label: another"),
        ("title: Small", "title: Large"),
        ("columns: [recovery_percent, mse_levels2]", "columns: [psnr_db]"),
        ("gamma: 3}", "gamma: 3, trainer.accelerator: cpu, trainer.enable_progress_bar: false, trainer.devices: 1}"),
        ("gamma: 3}", "gamma: 3}\n    paper: {recovery_percent: 5, dataset: ImageNet}"),
        ("images: 30\nsteps: 2", "images: 30\nsteps: 1\ncommon: {times_steps: 2}"),
    ],
)
def test_a_comment_or_a_label_does_not_change_the_key(old: str, new: str) -> None:
    assert TABLE.replace(old, new) != TABLE
    assert key(TABLE.replace(old, new)) == key()


def test_subsets_have_no_image_in_common_whatever_number_is_asked_for() -> None:
    Path("t.yaml").write_text(TABLE.replace("gamma: 3}", "gamma: 3}\n    subsets: true"))
    table = read_table("t.yaml")
    # Of digits there are 400 test images.
    for images, each in ((None, 30), (10, 10), (150, 150), (1000, 200)):
        a, b = (compose(table, row, None, Options(images=images)).settings["data"]["init_args"] for row in table.rows)
        assert (a["test_images"], a.get("test_offset", 0)) == (each, 0)
        assert (b["test_images"], b["test_offset"]) == (each, each)


@pytest.mark.parametrize("name", ["weights", "source"])
def test_one_byte_of_a_checkpoint_changes_the_key_and_its_place_does_not(name: str) -> None:
    before = key()
    copy_checkpoint(Path("elsewhere.safetensors"))
    assert key(TABLE.replace(f"{name}.safetensors", "elsewhere.safetensors")) == before
    content = bytearray(Path("elsewhere.safetensors").read_bytes())
    content[-1] ^= 1
    Path("elsewhere.safetensors").write_bytes(content)
    assert key(TABLE.replace(f"{name}.safetensors", "elsewhere.safetensors")) != before


def test_test_images_change_the_key_and_their_place_does_not() -> None:
    before = key(ON_FILES)
    shutil.copytree("data", "moved")
    assert key(ON_FILES, roots={"cifar10": Path("moved")}) == before
    Path("moved/train/cat").mkdir(parents=True)
    Path("moved/train/cat/9.png").write_bytes(b"1")
    assert key(ON_FILES, roots={"cifar10": Path("moved")}) == before
    Path("moved/test/cat/2.png").write_bytes(b"12345")
    assert key(ON_FILES, roots={"cifar10": Path("moved")}) != before


def test_a_universal_attack_is_fitted_to_training_images_so_they_count() -> None:
    universal = ON_FILES.replace("attack/gradmdm", "attack/universal-linf").replace("model.attack.gamma: 3", "model.attack.images: 9")
    before = key(universal)
    Path("data/train").mkdir()
    Path("data/train/9.png").write_bytes(b"1")
    assert key(universal) != before


def test_the_code_that_measures_counts_without_its_comments() -> None:
    source = 'def f(x: int) -> int:\n    """What it does.\n\n    More.\n    """\n    # why\n    return x + 1  # one\n'
    assert bare_code(source) == "def f(x: int) -> int:\n    return x + 1"
    assert bare_code(source) == bare_code(source.replace("why", "because")) != bare_code(source.replace("+ 1", "+ 2"))
    assert bare_code('class A: "what"\n') != bare_code('class B: "what"\n')


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """The package as a copy that keys look at; call it to add a line to one of its files."""
    place = tmp_path / "gatewatt"
    shutil.copytree(code.PACKAGE, place, ignore=shutil.ignore_patterns("__pycache__", "_*"), dirs_exist_ok=True)
    for init in code.PACKAGE.rglob("__init__.py"):
        shutil.copy(init, place / init.relative_to(code.PACKAGE))
    monkeypatch.setattr(code, "PACKAGE", place)

    def forget() -> None:
        for remembered in (code.imported, code.imports, code.bare_file):
            remembered.cache_clear()

    def change(name: str, line: str) -> None:
        with (place / name).open("a") as file:
            file.write(f"\n{line}\n")
        forget()

    forget()
    yield change
    forget()


@pytest.mark.parametrize(
    "name", ["networks/dvt.py", "networks/vit.py", "attacks/zoo.py", "attacks/loop.py", "gating/gate.py", "data/splits.py", "metrics/record.py"]
)
def test_the_code_behind_a_row_changes_its_key(name: str, copied: Callable[[str, str], None]) -> None:
    before = key()
    copied(name, "# a comment")
    assert key() == before
    copied(name, "X = 1")
    assert key() != before


@pytest.mark.parametrize(
    "name", ["networks/sact.py", "networks/skipnet.py", "gating/hooks.py", "defenses/jpeg.py", "networks/__init__.py", "cli/rows.py"]
)
def test_the_code_of_other_rows_does_not(name: str, copied: Callable[[str, str], None]) -> None:
    before = key()
    copied(name, "X = 1")
    assert key() == before


def test_code_is_followed_through_packages_and_into_functions(copied: Callable[[str, str], None]) -> None:
    before = key()
    copied("networks/dvt.py", "def late():\n    from gatewatt.networks import SACT")
    after = key()
    copied("networks/halting_units.py", "X = 1")
    assert len({before, after, key()}) == 3


def test_a_row_is_the_recipe_that_gatewatt_test_would_merge() -> None:
    Path("t.yaml").write_text(TABLE)
    table = read_table("t.yaml")
    settings = compose(table, table.rows[0], None, Options()).settings
    expected = load_recipes(["task/attack", "data/digits", "attack/gradmdm"]).settings
    card = rows.card_beside(Path("weights.safetensors"))
    network = {"class_path": "gatewatt.networks.DVT", "init_args": card["arguments"]}
    expected["model"]["init_args"]["attack"]["init_args"] |= {"gamma": 3, "steps": 2}
    expected["model"]["init_args"] |= {"network": network, "checkpoint": "weights.safetensors"}
    expected["model"]["init_args"] |= {"source": network, "source_checkpoint": "source.safetensors"}
    expected["data"]["init_args"] = {"seed": 0, "test_images": 30}
    expected |= {"seed_everything": 0}
    expected["trainer"]["logger"] = False
    assert settings == expected


def test_a_mapping_of_another_class_replaces_what_was_there() -> None:
    space = {"class_path": "gatewatt.attacks.L2Ball", "init_args": {"eps": 1.0}}
    settings = {"model": {"class_path": "Task", "init_args": {"attack": {"class_path": "A", "init_args": {"space": space}}}}}
    merge(settings, "model.attack.space", {"class_path": "gatewatt.attacks.ProjectionSpace"})
    assert settings["model"]["init_args"]["attack"]["init_args"]["space"] == {"class_path": "gatewatt.attacks.ProjectionSpace"}
    with pytest.raises(KeyError, match=r"model.attack.space.class_path is 'gatewatt"):
        merge(settings, "model.attack.space.class_path.eps", 3)


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (TABLE.replace("weights.safe", "nowhere.safe"), Options(), "no checkpoint nowhere.safetensors"),
        (
            TABLE.replace("weights.safetensors", "sact-32-cifar10"),
            Options(),
            "no checkpoint sact-32-cifar10; gatewatt fit -c sact-32-cifar10 trains one",
        ),
        (TABLE.replace("source.safe", "nowhere.safe"), Options(), "no checkpoint nowhere.safetensors"),
        (ON_FILES, Options(), "no folder for cifar10; give --data.root FOLDER"),
        (ON_FILES.replace("cifar10", "imagenet"), Options(), "no folder for imagenet; give --data.root imagenet=FOLDER"),
        (ON_FILES, Options(roots={"cifar10": Path("nowhere")}), "no folder nowhere/test with the test images of cifar10"),
    ],
)
def test_what_is_not_there_is_a_reason_and_no_error(text: str, options: Options, reason: str) -> None:
    Path("t.yaml").write_text(text)
    table = read_table("t.yaml")
    with pytest.raises(NotRun) as caught:
        plan(table, table.rows[0], None, options)
    assert str(caught.value) == reason


def test_records_of_images_that_are_not_at_hand_are_found_by_what_was_asked_of_the_run() -> None:
    Path("t.yaml").write_text(ON_FILES)
    table = read_table("t.yaml")
    there = plan(table, table.rows[0], None, Options(roots={"cifar10": Path("data")}))
    absent = plan(table, table.rows[0], None, Options(measuring=False))
    assert (absent.asked, absent.identity["data"]) == (there.asked, None)
    assert absent.key != there.key
    other = plan(table, table.rows[0], None, Options(measuring=False, steps=7))
    assert other.asked != there.asked
    # A folder that is named must be there even so.
    with pytest.raises(NotRun, match="no folder nowhere/test"):
        plan(table, table.rows[0], None, Options(roots={"cifar10": Path("nowhere")}, measuring=False))


def test_cifar_10_in_its_authors_files_is_read_as_such() -> None:
    Path("data/cifar-10-batches-py").mkdir()
    Path("t.yaml").write_text(ON_FILES)
    table = read_table("t.yaml")
    recipe = compose(table, table.rows[0], None, Options(roots={"cifar10": Path("data")}))
    assert recipe.settings["data"]["class_path"] == "gatewatt.data.CIFAR10Data"
    assert recipe.settings["data"]["init_args"]["root"] == "data"
