"""What every loader yields, and what every split is: pixels, labels, and which image is which."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset


class Batch(NamedTuple):
    """A batch of B images; pixels are not normalised, that is the network's first layer.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1].
        labels: int64 (B,), the class of each image.
        ids: int64 (B,), the position of each image in its whole split, 0..N-1. A fixed subset keeps the positions of the whole split, so an id
            names the same image whatever subset is evaluated.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class BatchKey(NamedTuple):
    """Everything that a split needs to produce one batch.

    Attributes:
        seed: seed of order and augmentation.
        epoch: epoch of the training, 0 in evaluation.
        number: number of the batch within the epoch, counted over all ranks.
        indices: int64 (B,), positions in the split.
    """

    seed: int
    epoch: int
    number: int
    indices: Tensor


class Images(Dataset[Batch]):
    """A split of N images, indexed with a whole batch's key; a loader over it has ``batch_size=None``.

    Attributes:
        labels: int64 (N,).
    """

    labels: Tensor

    def __len__(self) -> int:
        """Images of the split."""
        return len(self.labels)

    @abstractmethod
    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of ``key``; the same key gives the same batch."""

    @abstractmethod
    def at(self, indices: Tensor) -> Images:
        """The images at these positions as a split of its own."""

    @abstractmethod
    def augmented(self, augmentation: Any) -> Images:
        """The same images with this augmentation."""
