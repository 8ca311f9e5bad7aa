"""The loader of whole batches, which continues in the middle of an epoch where the trainer says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from gatewatt.data.batch import Batch
from gatewatt.data.order import BatchOrder


class BatchLoader(DataLoader[Batch]):
    """A loader that asks its :class:`~gatewatt.data.order.BatchOrder` for keys only when the first batch is wanted.

    Lightning makes the iterator of a resumed run before it tells the sampler which epoch it is, and worker processes are given keys the moment
    the iterator exists: made early, they would load the first epoch again.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """The batches, from the order's start on."""
        yield from super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the position is the trainer's own count of batches. Lightning takes a loader with this method for one that can resume."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def evaluated_ids(loaders: Any, batches: int | None = None) -> list[int]:
    """Positions of the images that an evaluation visits over all processes, in order.

    Args:
        loaders: what a Lightning trainer holds as its validation or test loaders: one :class:`BatchLoader`, or a list of one.
        batches: the batches of all processes together that a trainer is limited to; None for all.

    Raises:
        TypeError: for a loader of another kind, whose images have no ids to merge by.
    """
    loader = loaders[0] if isinstance(loaders, list) and loaders else loaders
    order = getattr(loader, "sampler", None)
    if not isinstance(order, BatchOrder):
        raise TypeError(f"images are identified by gatewatt's own loaders; got {type(loader).__name__}, use a module of gatewatt.data")
    # Whole batches are dealt to the processes in turn, so the first ones of each are the first ones of all.
    return [int(index) for index in order.indices[: None if batches is None else batches * order.batch_size]]
