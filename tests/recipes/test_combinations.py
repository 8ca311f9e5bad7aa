"""Every network takes every data set: the number of classes follows the data fragment, and a mistake is one line."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gatewatt.cli import main
from gatewatt.data import CIFAR100Data
from gatewatt.gating import DynamicNetwork
from gatewatt.networks.manidp import MaskBlock
from gatewatt.recipes import load_recipes
from gatewatt.shipped import shipped_folder
from gatewatt.tasks import Optimization

NETWORKS = sorted((shipped_folder("recipes") / "network").glob("*.yaml"))
DATA = sorted(path.stem for path in (shipped_folder("recipes") / "data").glob("*.yaml"))
CLASSES = {"cifar100": 100, "cub200": 200}
"""Data fragments that set the number of classes; with the others it is the network fragment's own, or a flag's."""


def settings(*fragments: str) -> dict[str, Any]:
    """The network of merged fragments, as a recipe has it."""
    return load_recipes(["task/train", *fragments]).settings["model"]["init_args"]["network"]


def build(network: dict[str, Any]) -> DynamicNetwork:
    """The network that a recipe describes."""
    module, _, name = network["class_path"].rpartition(".")
    kind: type[DynamicNetwork] = getattr(import_module(module), name)
    return kind(**network["init_args"])


@pytest.mark.parametrize("network", NETWORKS, ids=lambda path: path.stem)
def test_the_number_of_classes_follows_the_data(network: Path) -> None:
    fragment = f"network/{network.stem}"
    own = settings(fragment)
    for data in DATA:
        found = settings(fragment, f"data/{data}")
        assert found["class_path"] == own["class_path"]
        assert found["init_args"] == {**own["init_args"], **({"num_classes": CLASSES[data]} if data in CLASSES else {})}


def side(network: Path) -> int:
    """The image size that a network fragment is made for."""
    return 224 if "--size 224" in network.read_text() else 32


PAIRS = [
    pytest.param(network, data, id=f"{network.stem}-{data}") for network in NETWORKS for data in CLASSES if (side(network), data) != (224, "cifar100")
]


@pytest.mark.parametrize(("network", "data"), PAIRS)
def test_every_network_is_built_for_the_classes_of_the_data(network: Path, data: str) -> None:
    t2t = "t2t" in network.stem
    # Without numbers nothing takes time; the T2T front makes constants with NumPy, which needs some.
    with torch.device("cpu" if t2t else "meta"), torch.no_grad():
        images = torch.zeros(1, 3, *[64 if t2t else side(network)] * 2)
        output = build(settings(f"network/{network.stem}", f"data/{data}")).eval()(images, "dense")
    assert output.logits.shape == (1, CLASSES[data])
    assert output.exits is None or output.exits.shape[2] == CLASSES[data]


SPARING = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml") if "no_decay" in path.read_text())


@pytest.mark.parametrize("name", SPARING)
def test_what_a_recipe_spares_from_weight_decay_is_there(name: str) -> None:
    task = load_recipes([name]).settings["model"]["init_args"]
    with torch.device("cpu" if "t2t" in name else "meta"):
        network = build(task["network"])
    decayed, spared = (group["params"] for group in Optimization(**task["optimization"]["init_args"]).groups(network))
    assert len(decayed) > 5
    assert len(spared) > 5
    if "manidp" in name:
        masks = {id(parameter) for module in network.modules() if isinstance(module, MaskBlock) for parameter in module.parameters()}
        assert {id(parameter) for parameter in spared} == masks
    else:
        assert all(parameter.ndim > 1 for parameter in decayed)


def trains(path: Path) -> bool:
    """Whether a recipe is one that trains a dynamic network on clean images."""
    return load_recipes([path.stem]).settings["model"]["class_path"] == "gatewatt.tasks.DynamicTraining"


TRAINED = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml") if trains(path))


@pytest.mark.parametrize("name", TRAINED)
def test_every_schedule_has_a_short_variant_and_keeps_its_loss(name: str) -> None:
    own = load_recipes([name]).settings
    short = load_recipes([name, "schedule/two-cores"]).settings
    ours, theirs = ({**each["model"]["init_args"], "optimization": None} for each in (own, short))
    assert ours == theirs
    assert short["trainer"]["callbacks"] == own["trainer"]["callbacks"]
    assert (short["trainer"]["max_epochs"], short["trainer"]["max_steps"], short["trainer"]["accelerator"]) == (20, -1, "cpu")
    optimization = Optimization(**short["model"]["init_args"]["optimization"]["init_args"])
    assert (optimization.schedule, optimization.lr) == ("one_cycle", own["model"]["init_args"]["optimization"]["init_args"]["lr"])


ORIGINALS = {"skipnet-38-cifar10-original", "skipnet-38-cifar10-hrl-original", "sact-32-cifar10-original", "manidp-56-cifar10-original"}
ORIGINALS |= {"shallow-deep-resnet-56-cifar10-original", "skipnet-101-imagenet", "skipnet-101-imagenet-hrl", "sact-101-imagenet"}
ORIGINALS |= {"manidp-18-imagenet", "dvt-t2t-12-imagenet", "avit-tiny-imagenet"}
"""Of every family, what its authors published."""


@pytest.mark.parametrize("name", sorted(ORIGINALS))
def test_an_original_schedule_goes_to_other_data_whole(name: str) -> None:
    data = "cub200" if "imagenet" in name else "cifar100"
    own, moved = (load_recipes(recipes).settings for recipes in ([name], [name, f"data/{data}"]))
    assert moved["model"]["init_args"]["network"]["init_args"]["num_classes"] == CLASSES[data]
    assert moved["data"]["class_path"] != own["data"]["class_path"]
    for part in ("objective", "optimization"):
        assert moved["model"]["init_args"][part] == own["model"]["init_args"][part]
    assert moved["trainer"] == own["trainer"]
    # The file is named after the data that it was trained on.
    assert any("{dataset}" in callback.get("init_args", {}).get("name", "") for callback in moved["trainer"]["callbacks"])


def one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The error of a command that is refused."""
    assert main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("gatewatt: error")]
    return line


def test_a_network_named_after_the_data_is_told_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_line(["fit", "-c", "task/train", "-c", "data/cifar100", "-c", "network/skipnet-20-small"], capsys)
    assert "num_classes of the network is 10, the data cifar100 has 100 classes; set num_classes to 100" in line


FIT = ["fit", "-c", "task/train", "-c", "network/skipnet-20-small"]
QUICK = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def test_cifar100_is_trained_on_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stored:
        """What torchvision's class holds: two images of each class."""

        def __init__(self, root: object, train: bool = True) -> None:
            self.data, self.targets = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8), [*range(100)] * 2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CIFAR100Data, "dataset", Stored)
    assert main([*FIT, "-c", "data/cifar100", "--data.batch_size", "16", "--data.val_images", "100", *QUICK]) == 0


def test_cub_is_trained_on_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "CUB_200_2011"
    names = [f"{species:03d}.Bird/{index}.jpg" for species in (1, 77, 200) for index in range(4)]
    for index, name in enumerate(names):
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((36, 40, 3), 20 * index, dtype=np.uint8)).save(root / "images" / name)
    tables = {
        "images": names,
        "image_class_labels": [int(name[:3]) for name in names],
        "train_test_split": [int(index % 4 < 3) for index in range(len(names))],
        "classes": [f"{species:03d}.Bird" for species in range(1, 201)],
    }
    for table, values in tables.items():
        (root / f"{table}.txt").write_text("".join(f"{number} {value}\n" for number, value in enumerate(values, start=1)))
    sizes = ["--data.size", "32", "--data.in_memory", "true", "--data.workers", "0", "--data.batch_size", "4", "--data.val_images", "3"]
    assert main([*FIT, "-c", "data/cub200", "--data.root", str(root), *sizes, *QUICK]) == 0
