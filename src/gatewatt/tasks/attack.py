"""Attack a trained network and measure, image by image, what the attack recovered."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatewatt.attacks import Attack, GradMDM, UniversalAttack
from gatewatt.data.batch import Batch
from gatewatt.defenses import Wrapper, bare, described
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork, check_finite, gate_table, measuring_execution
from gatewatt.metrics.distortion import linf_levels, mse_levels2, round_to_8bit
from gatewatt.metrics.record import ImageRecord, image_records
from gatewatt.networks.checkpoint import load_weights
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
        defense: puts the target behind a defense, as ``lambda network: Defended(network, JPEG())``; a recipe names the class. The attack is then
            crafted through it (adaptive).
        oblivious: craft on the target without its defense instead, as an attacker who does not know of it.
        source: network to craft on; the target itself when left out. Another network makes it a transfer attack.
        source_checkpoint: weights of the source: a shipped name or a ``.safetensors`` path.
        checkpoint: weights of the target: a shipped name or a ``.safetensors`` path.
        channels_last: keep weights and images in that memory format.

    Raises:
        ValueError: if an oblivious attack has no defense to be oblivious of, or a source of its own.
    """

    def __init__(
        self,
        network: DynamicNetwork,
        attack: Attack | None = None,
        *,
        defense: Callable[[DynamicNetwork], Wrapper] | None = None,
        oblivious: bool = False,
        source: DynamicNetwork | None = None,
        source_checkpoint: str | None = None,
        checkpoint: str | None = None,
        channels_last: bool = True,
    ) -> None:
        super().__init__(network, defense=defense, checkpoint=checkpoint, channels_last=channels_last)
        if oblivious and (source is not None or not isinstance(self.network, Wrapper)):
            raise ValueError("oblivious leaves the target's own defense out of the attack: give a defense, and no source")
        self.oblivious, self.source = oblivious, bare(self.network) if oblivious else source
        if source_checkpoint is not None:
            if source is None:
                raise ValueError(f"source_checkpoint {source_checkpoint} needs a source, the network whose weights these are")
            load_weights(source, source_checkpoint)
        self.source_checkpoint = source_checkpoint
        self.source_ledger: FlopsLedger | None = None
        self.attack = attack or GradMDM()
        self.rows: list[ImageRecord] = []
        self.attack_seconds = 0.0

    def on_test_start(self) -> None:
        """Forget an earlier run; fit a universal perturbation, unless it was fitted already."""
        self.network.eval()
        self.rows, self.attack_seconds = [], 0.0
        self.reset_evaluation()
        if isinstance(self.attack, UniversalAttack) and self.attack.perturbation is None:
            start = time.perf_counter()
            images = self.training_images(self.attack.images, purpose=f"{self.attack.name} is fitted to")
            self.attack.fit(self.network if self.source is None else self.source, images)
            self.attack_seconds += time.perf_counter() - start

    on_predict_start = on_test_start

    def craft(self, batch: Batch) -> Attacked:
        """Measure a batch clean, and attack it."""
        output, flops = self.evaluation.step(batch)
        clean = Measured(output.logits.argmax(1), flops, gate_table(output.gates).executed)
        source, ledger = self.crafted_on(batch.images[:1])
        start = time.perf_counter()
        adversarial = self.attack(source, batch.images, batch.labels, ledger=ledger).images
        self.attack_seconds += time.perf_counter() - start
        return Attacked(batch, clean, adversarial)

    def crafted_on(self, image: Tensor) -> tuple[DynamicNetwork, FlopsLedger]:
        """The network that the attack sees, and its own prices, which weigh its gates, at the resolution of ``image`` (1, 3, H, W)."""
        if self.source is None:
            return self.network, self.ledger
        # Once for all batches: a trace takes longer than a short attack.
        if self.source_ledger is None or self.source_ledger.resolution != tuple(image.shape[2:]):
            self.source_ledger = price(self.source, image)
        return self.source, self.source_ledger

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
        """Target, attack, defense and precision, as plain values for the summary."""
        network = {**named(self.network), "checkpoint": self.checkpoint}
        source = "undefended" if self.oblivious else None if self.source is None else {**named(self.source), "checkpoint": self.source_checkpoint}
        attack = {**self.attack.settings, "source": source, "precision": str(self.trainer.precision)}
        return {"network": network, "attack": attack, "defense": described(self.network)}


def named(network: DynamicNetwork) -> dict[str, Any]:
    """Class and arguments of a network, whatever it is wrapped in."""
    inner = bare(network)
    return {"name": type(inner).__name__, **inner.arguments}
