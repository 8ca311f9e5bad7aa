"""How names of recipes and checkpoints become files."""

from __future__ import annotations

from pathlib import Path

import pytest

from gatewatt import shipped
from gatewatt.shipped import find_checkpoint, find_recipe, shipped_folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory without recipes of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["quickstart", "quickstart.yaml", "recipes/quickstart", "recipes/quickstart.yaml"])
def test_a_shipped_recipe_is_found_from_anywhere(name: str) -> None:
    assert find_recipe(name) == shipped_folder("recipes") / "quickstart.yaml"


def test_fragments_are_found_by_folder_and_name() -> None:
    assert find_recipe("network/skipnet-38") == shipped_folder("recipes") / "network" / "skipnet-38.yaml"


def test_a_file_here_comes_before_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("x: 1")
    assert find_recipe("recipes/quickstart.yaml").resolve() == tmp_path / "recipes" / "quickstart.yaml"
    assert find_recipe("quickstart") == shipped_folder("recipes") / "quickstart.yaml"


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("x: 1")
    assert find_recipe(tmp_path / "a.yml") == tmp_path / "a.yml"
    with pytest.raises(FileNotFoundError):
        find_recipe(tmp_path / "quickstart.yaml")


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="no recipe 'quikstart'.* did you mean quickstart"):
        find_recipe("quikstart")


def test_a_folder_is_no_recipe() -> None:
    with pytest.raises(FileNotFoundError, match="no recipe 'network'"):
        find_recipe("network")


def test_addresses_are_refused() -> None:
    with pytest.raises(ValueError, match="address on the net"):
        find_checkpoint("https://example.org/a.safetensors")


def test_checkpoints_are_found_by_name_with_and_without_suffix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "shipped_folder", lambda kind: tmp_path / kind)
    weights = tmp_path / "checkpoints" / "skipnet-38-cifar10.safetensors"
    weights.parent.mkdir()
    weights.touch()
    monkeypatch.chdir(weights.parent.parent.parent)
    for name in ("skipnet-38-cifar10", "skipnet-38-cifar10.safetensors", "checkpoints/skipnet-38-cifar10.safetensors", weights):
        assert find_checkpoint(name).samefile(weights)
    with pytest.raises(FileNotFoundError, match="did you mean skipnet-38-cifar10"):
        find_checkpoint("skipnet-38-cifar")


def test_an_installed_package_uses_its_own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "PACKAGE", tmp_path / "site" / "gatewatt")
    assert shipped_folder("recipes") == tmp_path / "recipes"
    (tmp_path / "site" / "gatewatt" / "_recipes").mkdir(parents=True)
    assert shipped_folder("recipes") == tmp_path / "site" / "gatewatt" / "_recipes"
