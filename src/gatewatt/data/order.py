"""Which images form which batch, on which process: a function of (seed, epoch, ranks) and of nothing else.

A loader of gatewatt runs over whole batches (``batch_size=None``): :class:`BatchOrder` says which images form a batch, the dataset returns it as
one :class:`~gatewatt.data.batch.Batch`. Randomness comes from generators that are seeded by what they are for, never from the global one: the
number of workers, a resume in the middle of a run, or an attack that draws noise cannot change what is loaded.

In training batch k of the epoch goes to rank k mod world, and its augmentation depends on k, not on the number of ranks. In evaluation whole
batches are dealt to the ranks in turn: dealing images instead changes who shares a batch, and repeating images to even the shares out (what
:class:`torch.utils.data.DistributedSampler` does) biases every mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DistributedSampler

from gatewatt.data.batch import BatchKey


def generator(*purpose: int | str) -> torch.Generator:
    """A CPU generator seeded by what it is for, e.g. ``generator(seed, "order", epoch)``.

    Example:
        >>> torch.randperm(5, generator=generator(0, "order", 1)).equal(torch.randperm(5, generator=generator(0, "order", 1)))
        True
    """
    digest = blake2b(repr(purpose).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@contextmanager
def lent(source: torch.Generator) -> Iterator[None]:
    """Let the global CPU generator of torch, the only one that torchvision draws from, go on from ``source``; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(source.get_state())
        yield


def process() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


class TooFewBatches(ValueError):
    """There are fewer batches than processes. Every process meets this alike, so one of them is enough to say so."""

    alike = True


# A DistributedSampler by type only: Lightning replaces the sampler of a loader on several processes by its own, which repeats images, unless it
# finds this type. Nothing of the parent is used.
class BatchOrder(DistributedSampler):
    """The batches of one pass over a split, as this rank sees them.

    Args:
        indices: int64 (N,), the positions to visit; in this order unless ``shuffle``.
        batch_size: images per batch, at least 1.
        seed: seed of the shuffling.
        shuffle: training order: shuffled anew in each epoch, the last incomplete batch dropped, equally many batches on each rank. Otherwise
            every image exactly once over all ranks.

    Attributes:
        start: asked at the beginning of a training pass for how many of this rank's batches to leave out, because a resumed run has already
            trained on them; None for none.

    Raises:
        ValueError: on a batch size below 1.
        TooFewBatches: when iterated, if there are fewer batches than processes.

    Example:
        >>> order = BatchOrder(torch.arange(5), 2)
        >>> [key.indices.tolist() for key in order]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, indices: Tensor, batch_size: int, *, seed: int = 0, shuffle: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.indices = indices
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.start: Callable[[], int] | None = None
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; Lightning calls this."""
        self.epoch = epoch

    def _numbers(self) -> range:
        """The numbers of this rank's batches."""
        rank, world = process()
        images = len(self.indices)
        count = images // self.batch_size if self.shuffle else -(-images // self.batch_size)
        if count < world:
            raise TooFewBatches(
                f"batch_size {self.batch_size} makes {count} batches of {images} images, fewer than the {world} processes; "
                f"use a smaller batch_size, more images or fewer processes"
            )
        return range(rank, count - count % world if self.shuffle else count, world)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._numbers())

    def __iter__(self) -> Iterator[BatchKey]:
        """The keys of this rank's batches."""
        epoch, indices, done = 0, self.indices, 0
        if self.shuffle:
            epoch, done = self.epoch, self.start() if self.start is not None else 0
            indices = indices[torch.randperm(len(indices), generator=generator(self.seed, "order", epoch))]
        for number in self._numbers()[done:]:
            yield BatchKey(self.seed, epoch, number, indices[number * self.batch_size : (number + 1) * self.batch_size])
