"""What every task has: a network in its memory format, its price list, and the running clean figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from torch import Tensor

from gatewatt.data.batch import Batch, BatchKey
from gatewatt.data.module import ImageData
from gatewatt.data.splits import subset
from gatewatt.defenses import Wrapper
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork
from gatewatt.networks.checkpoint import load_weights
from gatewatt.tasks.evaluate import CleanEvaluation


class NetworkTask(L.LightningModule):
    """A LightningModule around one dynamic network, priced on the first image that arrives.

    Args:
        network: the network.
        defense: puts it behind a defense, as ``lambda network: Defended(network, JPEG())``; a recipe names the class. The pair is the task's
            network then.
        checkpoint: weights to load into it: a shipped name or a ``.safetensors`` path of the same architecture.
        channels_last: keep weights and images in that memory format (faster on CPU and GPU).
    """

    ledger: FlopsLedger
    evaluation: CleanEvaluation

    def __init__(
        self,
        network: DynamicNetwork,
        *,
        defense: Callable[[DynamicNetwork], Wrapper] | None = None,
        checkpoint: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        network = network if defense is None else defense(network)
        if checkpoint is not None:
            load_weights(network, checkpoint)
        self.checkpoint = checkpoint
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)
        self._priced_at: tuple[int, ...] | None = None

    @property
    def num_classes(self) -> int:
        """Classes K of the network."""
        return int(self.network.arguments["num_classes"])

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bring the images into the memory format of the weights; price the network on the first of a new resolution."""
        if self._priced_at != batch.images.shape[2:]:
            self.ledger = price(self.network, batch.images[:1])
            self.evaluation = CleanEvaluation(self.network, self.ledger, self.num_classes).to(self.device)
            self._priced_at = tuple(batch.images.shape[2:])
        return batch._replace(images=batch.images.contiguous(memory_format=self.memory_format))

    def reset_evaluation(self) -> None:
        """Start the clean figures from zero; before the first batch there are none."""
        if self._priced_at is not None:
            self.evaluation.reset()

    def training_images(self, count: int, *, purpose: str) -> Iterator[Tensor]:
        """The first ``count`` of a seeded permutation of the training images, without augmentation, in batches; the same on every process.

        Args:
            count: how many; all there are, if they are fewer.
            purpose: what is done with them, for the message.

        Raises:
            ValueError: if the trainer has no data module of :mod:`gatewatt.data`.
        """
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ImageData):
            raise ValueError(f"{purpose} training images: give the trainer a data module of gatewatt.data")
        images = data.split("train").augmented(None)
        chosen = subset(len(images), min(count, len(images)), data.split_seed)
        for number, indices in enumerate(chosen.split(data.eval_batch_size)):
            pixels = images[BatchKey(data.seed, 0, number, indices)].images
            yield pixels.to(self.device).contiguous(memory_format=self.memory_format)
