"""What every task measures on clean images: accuracy, FLOPs per image, gate usage, and what really ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from gatewatt.data.batch import Batch
from gatewatt.flops import ExecutionMeter, FlopsLedger
from gatewatt.gating import DynamicNetwork, DynamicOutput, check_finite, check_images, check_labels, measuring_execution
from gatewatt.metrics import GateUsage, MeanFlops


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast within the block: gates, FLOPs and recovery are evaluated in float32 whatever the training precision."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def check_batch(batch: Batch, num_classes: int) -> None:
    """Raise unless the images are valid pixels and the labels one class index per image."""
    check_images(batch.images)
    check_labels(batch.labels, batch.images)
    low, high = batch.labels.aminmax()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"labels span {int(low)} to {int(high)}, but the network has {num_classes} classes (0 to {num_classes - 1}); "
            "set the network's num_classes to the data's"
        )


class CleanEvaluation(nn.Module):
    """Running figures of a network on clean images, really skipped if it can (:func:`~gatewatt.gating.measuring_execution`), in float32.

    Args:
        network: the network to measure; it is not registered as a submodule.
        ledger: its price list at the images' resolution.
        num_classes: classes K of the network.
    """

    def __init__(self, network: DynamicNetwork, ledger: FlopsLedger, num_classes: int) -> None:
        super().__init__()
        self._network = (network,)  # a tuple hides it from nn.Module: its parameters belong to the task
        self.ledger, self.num_classes, self.execution = ledger, num_classes, measuring_execution(network)
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.flops, self.usage = MeanFlops(), GateUsage(sum(ledger.units.values()))
        self.charged = nn.ModuleList([MeanFlops() for _ in ledger.units])  # one per gate, in the ledger's order
        self.meter = ExecutionMeter(network, ledger)

    def step(self, batch: Batch) -> tuple[DynamicOutput, Tensor]:
        """Run one batch; returns the output and the FLOPs (B,) float64 of each image.

        Raises:
            ValueError: if images, labels, scores or logits are invalid; nothing of the batch is counted then.
        """
        check_batch(batch, self.num_classes)
        with full_precision(), torch.no_grad(), self.meter:
            output = self._network[0](batch.images, self.execution)
        check_finite(output)
        flops = self.ledger(output.gates)
        self.accuracy.update(output.logits, batch.labels)
        self.flops.update(flops)
        self.usage.update(torch.cat([gate.executed for gate in output.gates.values()], dim=1))
        for metric, charged in zip(self.per_gate.values(), self.ledger.per_gate(output.gates).values(), strict=True):
            metric.update(charged)
        return output, flops

    @property
    def per_gate(self) -> dict[str, MeanFlops]:
        """Running FLOPs charged to each gate."""
        return {gate: metric for gate, metric in zip(self.ledger.units, self.charged, strict=True) if isinstance(metric, MeanFlops)}

    def reset(self) -> None:
        """Start from zero."""
        for metric in (self.accuracy, self.flops, self.usage, *self.per_gate.values()):
            metric.reset()
        self.meter.reset()
