"""Train a dynamic network: its objective on clean images, its accuracy and FLOPs during validation and test."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from torch import Tensor

from gatewatt.data.batch import Batch
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork
from gatewatt.networks.checkpoint import load_weights
from gatewatt.objectives import CrossEntropy, Objective
from gatewatt.tasks.evaluate import CleanEvaluation, check_batch
from gatewatt.tasks.optimize import Optimization

class DynamicTraining(L.LightningModule):
    """Train ``network`` with ``objective``; validate and test it by what it really computes.

    Logged: ``train/<term>`` for each term of the objective, ``{val,test}/accuracy``, ``{val,test}/flops_clean`` (MACs per image) and
    ``{val,test}/flops_fraction`` (of dense).

    Args:
        network: the network to train.
        objective: its training loss.
        optimization: optimiser and schedule.
        checkpoint: weights to start from: a shipped name or a ``.safetensors`` path of the same architecture.
        channels_last: keep weights and images in that memory format (faster on CPU and GPU).
    """

    def __init__(
        self,
        network: DynamicNetwork,
        objective: Objective | None = None,
        optimization: Optimization | None = None,
        *,
        checkpoint: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if checkpoint is not None:
            load_weights(network, checkpoint)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network = network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.objective = objective or CrossEntropy()
        self.optimization = optimization or Optimization()
        self.ledger: FlopsLedger | None = None
        self.evaluation: CleanEvaluation | None = None

    def configure_optimizers(self) -> dict[str, Any]:
        """Optimiser and schedule over the steps of this run."""
        return self.optimization.configure(self.network.parameters(), int(self.trainer.estimated_stepping_batches))

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Bring the images into the memory format of the weights, and price the network on the first of them."""
        if self.ledger is None or self.ledger.resolution != tuple(batch.images.shape[2:]):
            self.ledger = price(self.network, batch.images[:1])
            self.evaluation = CleanEvaluation(self.network, self.ledger, self.num_classes).to(self.device)
        return batch._replace(images=batch.images.contiguous(memory_format=self.memory_format))

    @property
    def num_classes(self) -> int:
        """Classes K of the network."""
        return int(self.network.arguments["num_classes"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch of clean images."""
        check_batch(batch, self.num_classes)
        output = self.network(batch.images)
        assert self.ledger is not None  # priced when the batch arrived
        return self.total({name: term for name, term in self.objective(output, batch.labels, self.ledger).items()})

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Log every term and add them up.

        Raises:
            ValueError: naming the first term that is NaN or infinite; the step is not taken.
        """
        for name, term in terms.items():
            if not bool(torch.isfinite(term)):
                raise ValueError(f"the {name} term of the loss is {term.item()} at step {self.global_step}; lower the learning rate")
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, prog_bar=len(terms) < 3)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the figures of the last epoch."""
        if self.evaluation is not None:
            self.evaluation.reset()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure one batch of clean images."""
        assert self.evaluation is not None  # made when the batch arrived
        self.evaluation.step(batch)

    def on_validation_epoch_end(self) -> None:
        """Log accuracy and FLOPs."""
        self.report("val")

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_test_epoch_end(self) -> None:
        """Log accuracy and FLOPs."""
        self.report("test")

    def report(self, split: str) -> None:
        """Log the clean figures of an epoch; they are sums over all processes, so no further averaging is due."""
        assert self.evaluation is not None
        assert self.ledger is not None
        flops = self.evaluation.flops.compute()
        figures = {"accuracy": self.evaluation.accuracy.compute(), "flops_clean": flops, "flops_fraction": flops / self.ledger.dense}
        self.log_dict({f"{split}/{name}": value for name, value in figures.items()}, prog_bar=True, rank_zero_only=False)

__all__ = ["DynamicTraining", "full_precision"]
