"""CUB-200-2011 in its own layout: labels and splits come from its tables, and tables that do not fit are refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gatewatt.data.cub import CubData


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """Three species, four images each; grey level 20 x id. Two of each species are for testing, and ids run against the file names."""
    root = tmp_path / "CUB_200_2011"
    images, labels, splits = [], [], []
    for identifier in range(1, 13):
        species = (identifier - 1) % 3 + 1
        name = f"00{species}.Bird/{99 - identifier}.jpg"
        file = root / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 50, 3), 20 * identifier, dtype=np.uint8)).save(file, quality=95)
        images.append(f"{identifier} {name}")
        labels.append(f"{identifier} {species}")
        splits.append(f"{identifier} {int(identifier <= 6)}")
    classes = [f"{species} 00{species}.Bird" for species in (1, 2, 3)]
    for name, rows in {"images": images, "image_class_labels": labels, "train_test_split": splits, "classes": classes}.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    return root


def data(root: Path, **arguments: object) -> CubData:
    return CubData(str(root), **{"size": 32, "batch_size": 2, "eval_batch_size": 4, "val_images": 3, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("in_memory", [False, True])
def test_images_labels_and_splits_are_those_of_the_tables(in_memory: bool, birds: Path) -> None:
    cub = data(birds, in_memory=in_memory)
    cub.setup()
    assert (cub.name, cub.num_classes, cub.classes[1]) == ("cub200", 3, "002.Bird")
    batches = list(cub.test_dataloader())
    images, labels = torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])
    assert images.shape == (6, 3, 32, 32)
    # In the order of images.txt, whatever the files are called.
    assert (images.mean((1, 2, 3)) * 255).round().tolist() == [20.0 * identifier for identifier in range(7, 13)]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert len(cub.split("train")) == 3
    assert sorted(cub.split("val").labels.tolist()) == [0, 1, 2]


def test_a_training_batch_is_a_random_crop_of_the_right_size(birds: Path) -> None:
    cub = data(birds, val_images=0)
    cub.setup("fit")
    assert next(iter(cub.train_dataloader())).images.shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("table", "text", "message"),
    [
        ("images", None, "no images.txt in"),
        ("images", "1 a.jpg\n2\n", "line 2: expected a number and a value"),
        ("images", "1 a.jpg\n1 b.jpg\n", "line 2: id 1 appears twice"),
        ("image_class_labels", "1 1\n", "image id 2 is in this file or in images.txt, but not in both"),
        ("image_class_labels", "\n".join(f"{i} 9" for i in range(1, 13)), "image 1 has class '9', which classes.txt does not list"),
        ("train_test_split", "\n".join(f"{i} 2" for i in range(1, 13)), "image 1 has '2'; expected 1 "),
        ("classes", "1 a\n3 b\n", "class ids must be 1 to 2"),
        ("train_test_split", "\n".join(f"{i} 1" for i in range(1, 13)), "names no test images"),
    ],
)
def test_tables_that_do_not_fit_are_named(table: str, text: str | None, message: str, birds: Path) -> None:
    file = birds / f"{table}.txt"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data(birds).setup("test")


def test_an_image_that_a_table_names_and_nobody_has_is_named(birds: Path) -> None:
    (birds / "images/001.Bird/92.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 images of .*images.txt are missing, the first is .*92.jpg"):
        data(birds).setup("test")
