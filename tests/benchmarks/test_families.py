"""The page of all families: what it says comes from the records, and static counterparts are measured on the images of these."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tests.training import QUIET, skipnet

from gatewatt import load
from gatewatt.data import DigitsData
from gatewatt.metrics.record import read_records
from gatewatt.networks.checkpoint import save
from gatewatt.shipped import shipped_folder

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")]


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, imported as it is run: beside its neighbours."""
    monkeypatch.syspath_prepend(str(shipped_folder("recipes").parent / "benchmarks"))
    return importlib.import_module("families")


def stored(folder: Path, name: str, seed: int, task: str) -> str:
    """A network in a file whose card holds the recipe of a task with these arguments."""
    save(skipnet(seed), folder / f"{name}.safetensors", card={"dataset": "digits", "recipe": f"model: {{init_args: {{{task}}}}}"}, overwrite=True)
    return str(folder / f"{name}.safetensors")


@pytest.fixture
def child(tmp_path: Path) -> str:
    return stored(tmp_path, "child", 8, "checkpoint: runs/stage1/first.safetensors")


@pytest.fixture
def first(tmp_path: Path) -> str:
    """The static parent of :func:`child`."""
    return stored(tmp_path, "first", 5, "execution: dense, checkpoint: null")


def cells(families: ModuleType, out: Path, name: str = "child") -> dict[str, str]:
    """The row of a checkpoint on the page."""
    line = next(line for line in (out / "FAMILIES.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    return dict(zip(families.COLUMNS, (cell.strip() for cell in line.strip("|").split("|")), strict=True))


def dense_accuracy(file: str, images: int) -> str:
    """In percent, over the first of the test images at once."""
    data = DigitsData(test_images=images, eval_batch_size=images)
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    with torch.no_grad():
        return f"{100 * (load(file)(batch.images, 'dense').logits.argmax(1) == batch.labels).double().mean():.1f} %"


def test_a_parent_is_measured_on_the_images_of_the_records(
    families: ModuleType, child: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    asked = ["--checkpoints", child, "--out", str(out), "--steps", "2", "--gamma", "2.5"]
    families.main([*asked, "--images", "12"])
    row, records = cells(families, out), read_records(out / "child/records.csv")
    assert row["static"] == f"{dense_accuracy(child, 12)} (dense)"
    assert (row["attack"], row["images"]) == ("2 steps, gamma 2.5", "12")
    varying = [len(set(unit)) == 2 for unit in zip(*(record.gates_clean for record in records), strict=True)]
    assert any(varying)
    assert row["gates that vary"] == f"{100 * sum(varying) / len(varying):.1f} %"

    def attacked_again(*arguments: object) -> None:
        raise AssertionError("what is there was attacked again")

    monkeypatch.setattr(families, "run_attack", attacked_again)
    # A number of images other than that of the records is not asked for.
    families.main([*asked, "--images", "5", "--parents", first])
    after = cells(families, out)
    assert after["static"] == f"{dense_accuracy(first, 12)} (parent)"
    assert {name: cell for name, cell in after.items() if name != "static"} == {name: cell for name, cell in row.items() if name != "static"}
    assert json.loads((out / "child/dense.json").read_text())["parent"] == "first"

    # What is there is not measured again either, and an old record says what it does not know, until it is measured.
    monkeypatch.setattr(families, "load", attacked_again)
    families.main(asked)
    assert cells(families, out) == after
    (out / "child/dense.json").write_text('{"accuracy_dense": 0.25}')
    (out / "FAMILIES.md").write_text(families.render(out))
    old = cells(families, out)
    assert (old["static"], old["gates that vary"]) == ("25.0 % (dense)", "-")
    monkeypatch.setattr(families, "load", load)
    families.main(asked)
    assert cells(families, out) == row

    stored(tmp_path, "child", 5, "checkpoint: runs/stage1/first.safetensors")
    with pytest.raises(SystemExit, match="child holds records of other images or weights; remove it"):
        families.main([*asked, "--parents", first])


def test_a_file_that_is_no_static_parent_is_refused(families: ModuleType, child: str, first: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="cards of these checkpoints name no parent, not first"):
        families.parents_of([first], [first])
    other = stored(tmp_path, "other", 5, "execution: dense")
    with pytest.raises(SystemExit, match="cards of these checkpoints name first, not other"):
        families.parents_of([child], [other])
    assert families.parents_of([child, other], [first]) == {child: first}
    with pytest.raises(SystemExit, match="cards of these checkpoints name first, not other"):
        families.parents_of([child], [first, other])
    stored(tmp_path, "first", 5, "execution: masked")
    with pytest.raises(SystemExit, match="first.safetensors was not trained with execution dense"):
        families.parents_of([child], [first])


def test_a_static_parent_is_found_behind_the_stages_between(families: ModuleType, child: str, first: str, tmp_path: Path) -> None:
    second = stored(tmp_path, "second", 6, "checkpoint: runs/stage1/first.safetensors, execution: masked")
    third = stored(tmp_path, "third", 7, "checkpoint: second.safetensors")
    assert families.parents_of([third, second, child], [first, second]) == {third: first, second: first, child: first}
    with pytest.raises(SystemExit, match="second.safetensors was not trained with execution dense, and none that was is given behind it"):
        families.parents_of([third], [second])
    for name, origin in [("second", "third"), ("third", "second")]:
        stored(tmp_path, name, 6, f"checkpoint: {origin}.safetensors")
    with pytest.raises(SystemExit, match="was not trained with execution dense"):
        families.parents_of([third], [second, third])


def test_what_has_no_images_at_hand_is_left_out(families: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    families.main(["--checkpoints", "skipnet-38-cifar10", "--out", str(tmp_path / "out")])
    assert "skipnet-38-cifar10: left out, its images need --data FOLDER" in capsys.readouterr().out
    assert (tmp_path / "out/FAMILIES.md").exists()
