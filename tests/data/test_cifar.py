"""CIFAR comes as pickles: they are read only if they are, byte for byte, the files that were published."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from gatewatt.data import CIFAR10Data, CIFAR100Data


class Bomb:
    """Pickles into a call that makes a folder."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("data", [CIFAR10Data, CIFAR100Data])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_pickle_that_was_not_published_is_never_opened(data: type[CIFAR10Data], stage: str, tmp_path: Path) -> None:
    dataset, marker = data.dataset, tmp_path / "executed"
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    for name, _ in [*dataset.train_list, *dataset.test_list, (dataset.meta["filename"], "")]:
        (folder / name).write_bytes(pickle.dumps(Bomb(str(marker))))
    with pytest.raises(FileNotFoundError) as refused:
        data(str(tmp_path)).setup(stage)
    assert "\n" not in str(refused.value)
    assert not marker.exists()
