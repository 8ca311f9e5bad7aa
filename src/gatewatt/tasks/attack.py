"""Attack a trained network and measure, image by image, what the attack recovered."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatewatt.attacks import Attack, GradMDM
from gatewatt.data.batch import Batch
from gatewatt.gating import DynamicNetwork, check_finite, gate_table, measuring_execution
from gatewatt.metrics.distortion import linf_levels, mse_levels2, round_to_8bit
from gatewatt.metrics.record import ImageRecord, image_records
from gatewatt.tasks.base import NetworkTask
from gatewatt.tasks.evaluate import full_precision


class Measured(NamedTuple):
    """What a network did with a batch: predictions (B,), FLOPs (B,) float64, executed units (B, N)."""

    prediction: Tensor
    flops: Tensor
    executed: Tensor


class Attacked(NamedTuple):
    """A batch with its attack: clean images and their figures, adversarial images in [0, 1]."""

    batch: Batch
    clean: Measured
    adversarial: Tensor


class EnergyAttackEvaluation(NetworkTask):
    """Attack ``network`` and record every image: FLOPs, predictions and distortion, float and after rounding to 8 bits.

    Figures are taken from a pass that really skips (a network that cannot is measured masked, by the ledger), in float32, whatever the
    precision the attack was crafted in. ``test`` keeps one
    :class:`~gatewatt.metrics.record.ImageRecord` per image in ``rows``; ``predict`` returns the images.

    Args:
        network: the target.
        attack: the attack (default: GradMDM).
        source: network to craft on; the target itself when left out. Another network makes it a transfer attack.
        checkpoint: weights of the target: a shipped name or a ``.safetensors`` path.
        channels_last: keep weights and images in that memory format.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        attack: Attack | None = None,
        *,
        source: DynamicNetwork | None = None,
        checkpoint: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(network, checkpoint=checkpoint, channels_last=channels_last)
        self.source = source
        self.attack = attack or GradMDM()
        self.rows: list[ImageRecord] = []
        self.attack_seconds = 0.0

    def on_test_start(self) -> None:
        """Forget an earlier run."""
        self.network.eval()
        self.rows, self.attack_seconds = [], 0.0
        self.reset_evaluation()

    on_predict_start = on_test_start

    def craft(self, batch: Batch) -> Attacked:
        """Measure a batch clean, and attack it."""
        output, flops = self.evaluation.step(batch)
        clean = Measured(output.logits.argmax(1), flops, gate_table(output.gates).executed)
        start = time.perf_counter()
        source = self.network if self.source is None else self.source
        # The source's own prices weigh its gates; only for a white-box attack are they known already.
        ledger = self.ledger if self.source is None else None
        adversarial = self.attack(source, batch.images, batch.labels, ledger=ledger).images
        self.attack_seconds += time.perf_counter() - start
        return Attacked(batch, clean, adversarial)

    def measure(self, images: Tensor) -> Measured:
        """Run the target on images (B, 3, H, W) in [0, 1], really skipped if it can, in float32."""
        with full_precision(), torch.no_grad():
            output = self.network(images.to(self.device).contiguous(memory_format=self.memory_format), measuring_execution(self.network))
        check_finite(output)
        return Measured(output.logits.argmax(1), self.ledger(output.gates), gate_table(output.gates).executed)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Attack one batch and keep its rows."""
        _, clean, adversarial = self.craft(batch)
        rounded = round_to_8bit(adversarial)
        attacked, attacked_8bit = self.measure(adversarial), self.measure(rounded)
        self.rows += image_records(
            ids=batch.ids,
            labels=batch.labels,
            prediction_clean=clean.prediction,
            prediction_adversarial=attacked.prediction,
            prediction_adversarial_8bit=attacked_8bit.prediction,
            flops_dense=self.ledger.dense,
            flops_clean=clean.flops,
            flops_adversarial=attacked.flops,
            flops_adversarial_8bit=attacked_8bit.flops,
            mse_levels2=mse_levels2(batch.images, adversarial),
            linf_levels=linf_levels(batch.images, adversarial),
            mse_levels2_8bit=mse_levels2(batch.images, rounded),
            executed_clean=clean.executed,
            executed_adversarial=attacked.executed,
        )

    def predict_step(self, batch: Batch, batch_idx: int) -> Attacked:
        """Attack one batch and hand it out."""
        return self.craft(batch)

    def describe(self) -> dict[str, Any]:
        """Target, attack and precision, as plain values for the summary."""
        network = {"name": type(self.network).__name__, **self.network.arguments, "checkpoint": self.checkpoint}
        source = None if self.source is None else {"name": type(self.source).__name__, **self.source.arguments}
        return {"network": network, "attack": {**self.attack.settings, "source": source, "precision": str(self.trainer.precision)}}
