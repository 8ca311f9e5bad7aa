"""Train a dynamic network: its objective on clean images, its accuracy and FLOPs during validation and test."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from gatewatt.data.batch import Batch
from gatewatt.data.distortion import Mixing
from gatewatt.data.order import generator
from gatewatt.defenses import Wrapper
from gatewatt.gating import DynamicNetwork, Execution
from gatewatt.objectives import CrossEntropy, Objective
from gatewatt.tasks.base import NetworkTask
from gatewatt.tasks.evaluate import check_batch
from gatewatt.tasks.optimize import Optimization


class DynamicTraining(NetworkTask):
    """Train ``network`` with ``objective``; validate and test it by what it really computes.

    Logged: ``train/<term>`` for each term of the objective, ``{val,test}/accuracy``, ``{val,test}/flops_clean`` (MACs per image) and
    ``{val,test}/flops_fraction`` (of dense).

    Args:
        network: the network to train.
        objective: its training loss.
        optimization: optimiser and schedule.
        defense: what the network is trained and measured behind, see :class:`~gatewatt.tasks.base.NetworkTask`; exported is the network inside.
        checkpoint: weights to start from: a shipped name or a ``.safetensors`` path of the same architecture.
        channels_last: keep weights and images in that memory format (faster on CPU and GPU).
        execution: ``masked``, or ``dense`` to train the static parent of a network that is made dynamic in a second stage; the parent is then what
            validation and test measure, too.
        mixing: mixup and CutMix of the training batches; the objective then gets the share of each class, (B, K), for labels.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        objective: Objective | None = None,
        optimization: Optimization | None = None,
        *,
        defense: Callable[[DynamicNetwork], Wrapper] | None = None,
        checkpoint: str | None = None,
        channels_last: bool = True,
        execution: Literal["masked", "dense"] = "masked",
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__(network, defense=defense, checkpoint=checkpoint, channels_last=channels_last)
        if execution not in ("masked", "dense"):
            raise ValueError(f"execution must be masked or dense to train, got {execution!r}")
        self.execution: Execution = execution
        # A loaded network comes in eval mode, and Lightning trains a module in the mode it finds it in.
        self.network.train()
        self.objective = objective or CrossEntropy()
        self.optimization = optimization or Optimization()
        self.mixing = mixing

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Optimiser and schedule over the steps of this run."""
        return self.optimization.configure(self.network, int(self.trainer.estimated_stepping_batches))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tell the objective how far the run is, and seed the step.

        Its randomness is a function of (seed, step, process), so that a resumed run draws what an uninterrupted one would.
        """
        self.objective.progress = self.global_step / self.trainer.estimated_stepping_batches
        seed = os.environ.get("PL_GLOBAL_SEED", "0")  # where Lightning's seed_everything leaves it
        torch.manual_seed(generator("step", seed, self.global_step, self.global_rank).initial_seed())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch of clean images."""
        check_batch(batch, self.num_classes)
        images, labels = batch.images, batch.labels
        if self.mixing is not None:
            images, labels = self.mixing(images, labels, self.num_classes)
        output = self.network(images.contiguous(memory_format=self.memory_format), self.execution)
        return self.total(self.objective(output, labels, self.ledger))

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Log every term and add them up.

        Raises:
            ValueError: naming the first term that is NaN or infinite; the step is not taken.
        """
        for name, term in terms.items():
            if not bool(torch.isfinite(term)):
                raise ValueError(f"the {name} term of the loss is {term.item()} at step {self.global_step}; lower the learning rate")
        loss = torch.stack(list(terms.values())).sum()
        for name, term in terms.items():
            self.log(f"train/{name}", term.detach(), prog_bar=name == "cross_entropy")
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the figures of the last epoch."""
        self.reset_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure one batch of clean images."""
        if self.execution == "dense":
            # Here and not once: the evaluation is made anew for images of another size.
            self.evaluation.execution = "dense"
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
        flops = self.evaluation.flops.compute()
        figures = {"accuracy": self.evaluation.accuracy.compute(), "flops_clean": flops, "flops_fraction": flops / self.ledger.dense}
        self.log_dict({f"{split}/{name}": value for name, value in figures.items()}, prog_bar=True, rank_zero_only=False)
