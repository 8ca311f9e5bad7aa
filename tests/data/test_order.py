"""Which images form which batch: promises about order, ranks, epochs and resuming."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from gatewatt.data import Augmentation, Batch, BatchOrder, Images, MemoryImages
from gatewatt.data import order as order_module
from gatewatt.data.module import ImageData, Split


class Tiny(ImageData):
    """26 training, 5 validation and 7 test images whose pixels are their own position."""

    augmentation = Augmentation(crop_padding=1)

    def __init__(
        self,
        *,
        seed: int = 0,
        workers: int = 0,
        val_images: int = 5,
        test_images: int | None = None,
        test_offset: int = 0,
        batch_size: int = 4,
    ) -> None:
        super().__init__(
            name="tiny",
            size=4,
            batch_size=batch_size,
            eval_batch_size=3,
            workers=workers,
            seed=seed,
            split_seed=0,
            val_images=val_images,
            val_subset=None,
            test_images=test_images,
            test_offset=test_offset,
        )

    @property
    def num_classes(self) -> int:
        return 2

    def source(self, split: Split) -> Images | None:
        count = {"train": 31, "val": 0, "test": 7}[split]
        if not count:
            return None
        images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4) * 8
        return MemoryImages(images.contiguous(), torch.arange(count) % 2)


class Reader(LightningModule):
    """Remembers every batch it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: Batch, step: int) -> Tensor:
        self.seen.append((self.current_epoch, batch.ids.tolist(), batch.images.sum().item()))
        return self.weight * batch.images.mean()

    def validation_step(self, batch: Batch, step: int) -> None:
        assert isinstance(batch, Batch)

    def test_step(self, batch: Batch, step: int) -> None:
        self.seen.append((0, batch.ids.tolist(), batch.images.sum().item()))

    def predict_step(self, batch: Batch, step: int) -> Tensor:
        return batch.ids

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(root: Path, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=root, **(quiet | {"enable_checkpointing": False} | settings))


def joined(lists: Iterable[list[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def ranks(monkeypatch: pytest.MonkeyPatch, world: int, order: BatchOrder) -> list[list[list[int]]]:
    """The batches of every rank of ``world``."""
    dealt = []
    for rank in range(world):
        monkeypatch.setattr(order_module, "process", lambda rank=rank: (rank, world))
        batches = [key.indices.tolist() for key in order]
        assert len(batches) == len(order)
        dealt.append(batches)
    return dealt


def test_training_order_is_a_function_of_seed_and_epoch() -> None:
    def epochs(seed: int) -> list[list[int]]:
        order = BatchOrder(torch.arange(40), 8, seed=seed, shuffle=True)
        passes = []
        for epoch in (2, 0, 2):
            torch.rand(3)  # whatever else draws from the global generator
            order.set_epoch(epoch)
            passes.append(torch.cat([key.indices for key in order]).tolist())
        return passes

    first, other = epochs(0), epochs(1)
    assert first == epochs(0)
    assert first[0] == first[2] != first[1]
    assert first[0] != other[0]
    assert all(sorted(visited) == list(range(40)) for visited in first + other)


def test_loading_leaves_the_global_generator_alone() -> None:
    data = Tiny()
    state = torch.get_rng_state()
    for _ in (*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()):
        pass
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("images", range(6, 30))
@pytest.mark.parametrize("world", [1, 2, 3])
def test_in_evaluation_the_ranks_together_see_each_image_once_in_the_batches_of_one_rank(
    images: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = BatchOrder(torch.arange(images), 2)
    alone = ranks(monkeypatch, 1, order)[0]
    dealt = ranks(monkeypatch, world, order)
    assert sorted(joined(joined(dealt))) == list(range(images))
    assert [dealt[index % world][index // world] for index in range(len(alone))] == alone


@pytest.mark.parametrize("images", [12, 13, 17, 23])
def test_in_training_the_ranks_share_full_batches_equally_and_see_no_image_twice(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt = ranks(monkeypatch, 3, BatchOrder(torch.arange(images), 2, shuffle=True))
    assert {len(batches) for batches in dealt} == {images // 2 // 3}
    assert {len(batch) for batches in dealt for batch in batches} == {2}
    visited = joined(joined(dealt))
    assert len(set(visited)) == len(visited)


def test_a_batch_is_augmented_alike_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = Tiny().train_dataloader()
    alone = list(loader)
    monkeypatch.setattr(order_module, "process", lambda: (1, 2))
    second = list(loader)
    assert len(second) == 3
    for index, batch in enumerate(second):
        assert all(torch.equal(a, b) for a, b in zip(batch, alone[2 * index + 1], strict=True))


@pytest.mark.parametrize("shuffle", [True, False])
def test_fewer_batches_than_ranks_are_refused(shuffle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order_module, "process", lambda: (0, 4))
    order = BatchOrder(torch.arange(6), 2, shuffle=shuffle)
    with pytest.raises(ValueError, match="batch_size 2 makes 3 batches of 6 images, fewer than the 4 processes; use a smaller batch_size"):
        len(order)
    with pytest.raises(ValueError, match="fewer than the 4 processes"):
        list(order)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        BatchOrder(torch.arange(6), 0)


def test_ids_are_positions_and_name_the_same_image_in_a_subset() -> None:
    whole = torch.cat([batch.ids for batch in Tiny().test_dataloader()])
    assert whole.tolist() == list(range(7))
    for batch in Tiny(test_images=4).test_dataloader():
        assert torch.equal(batch.images[:, 0, 0, 0], batch.ids * 8 / 255)


def test_a_subset_is_fixed_and_the_beginning_of_a_larger_one() -> None:
    def ids(count: int, seed: int = 0) -> list[int]:
        return torch.cat([batch.ids for batch in Tiny(seed=seed, test_images=count).test_dataloader()]).tolist()

    assert ids(3) == ids(3, seed=5) == ids(6)[:3]
    assert sorted(ids(7)) == list(range(7))
    with pytest.raises(ValueError, match="a subset of 8 images was asked for, there are 7; ask for at most 7"):
        ids(8)


def test_subsets_behind_one_another_share_no_image_and_continue_the_larger_one() -> None:
    def ids(count: int | None, offset: int) -> list[int]:
        return torch.cat([batch.ids for batch in Tiny(test_images=count, test_offset=offset).test_dataloader()]).tolist()

    assert ids(3, 0) + ids(3, 3) == ids(6, 0)
    assert ids(None, 3) == ids(7, 0)[3:]
    with pytest.raises(ValueError, match="a subset of 4 images behind the first 4 was asked for, there are 3; ask for at most 3"):
        ids(4, 4)
    with pytest.raises(ValueError, match="a subset of all images behind the first 7 was asked for, there are 0"):
        ids(None, 7)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")  # the resumed runs write no checkpoints
def test_a_run_resumed_from_any_step_loads_what_the_uninterrupted_run_loads(workers: int, tmp_path: Path) -> None:
    every_step = ModelCheckpoint(tmp_path / "steps", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Reader()
    trainer(tmp_path, max_epochs=2, callbacks=[every_step], enable_checkpointing=True).fit(whole, datamodule=Tiny())
    assert [epoch for epoch, *_ in whole.seen] == [0] * 6 + [1] * 6
    for step in range(1, 12) if workers == 0 else (2, 8):
        resumed = Reader()
        trainer(tmp_path, max_epochs=2).fit(resumed, datamodule=Tiny(workers=workers), ckpt_path=tmp_path / "steps" / f"step={step}.ckpt")
        assert resumed.seen == whole.seen[step:], f"resumed from step {step}"


def test_a_second_training_loader_in_the_middle_of_an_epoch_begins_at_the_beginning(tmp_path: Path) -> None:
    lengths = []

    class Curious(Reader):
        def training_step(self, batch: Batch, step: int) -> Tensor:
            lengths.append(len(list(self.trainer.datamodule.train_dataloader())))  # type: ignore[attr-defined]
            return super().training_step(batch, step)

    trainer(tmp_path, max_epochs=1).fit(Curious(), datamodule=Tiny())
    assert lengths == [6] * 6


def test_lightning_tests_and_predicts_every_image_once(tmp_path: Path) -> None:
    reader = Reader()
    trainer(tmp_path).test(reader, datamodule=Tiny(), verbose=False)
    assert joined(ids for _, ids, _ in reader.seen) == list(range(7))
    predictions = trainer(tmp_path).predict(reader, datamodule=Tiny())
    assert torch.cat(predictions).tolist() == list(range(7))  # type: ignore[arg-type]


def test_training_without_validation_images(tmp_path: Path) -> None:
    reader = Reader()
    with pytest.warns(UserWarning, match="Please make sure this was your intention"):
        trainer(tmp_path, max_epochs=1).fit(reader, datamodule=Tiny(val_images=0))
    assert len(reader.seen) == 7


def read_alone(rank: int, world: int, port: int, root: str) -> None:
    """One of two real processes; writes the ids it tested and predicted and the batches it trained on."""
    import os

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    reader = Reader()
    trainer(Path(root), max_epochs=1, strategy="ddp", devices=world).fit(reader, datamodule=Tiny())
    trained = [ids for _, ids, _ in reader.seen]
    reader.seen.clear()
    trainer(Path(root), strategy="ddp", devices=world).test(reader, datamodule=Tiny(), verbose=False)
    torch.save({"trained": trained, "tested": [ids for _, ids, _ in reader.seen]}, Path(root) / f"{rank}.pt")


@pytest.mark.ddp
@pytest.mark.slow
def test_lightning_on_two_processes_keeps_our_order(tmp_path: Path) -> None:
    import multiprocessing
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=read_alone, args=(rank, 2, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["tested"] == [[0, 1, 2], [6]]
    assert second["tested"] == [[3, 4, 5]]
    alone = [key.indices.tolist() for key in BatchOrder(torch.arange(26), 4, shuffle=True)]
    assert first["trained"] == alone[0::2]
    assert second["trained"] == alone[1::2]
