"""Energy-adversarial training: every batch is attacked in the loop, and the network trains on both halves at once."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from gatewatt.attacks import Attack, Ball, GradMDM
from gatewatt.data import Augmentation, ImageData, MemoryImages
from gatewatt.data.batch import Batch
from gatewatt.data.order import generator
from gatewatt.defenses import Crops, PerturbationCache
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, split_output
from gatewatt.objectives import EnergyAdversarialObjective
from gatewatt.tasks.evaluate import check_batch
from gatewatt.tasks.optimize import Optimization
from gatewatt.tasks.train import DynamicTraining


class EnergyAdversarialTraining(DynamicTraining):
    """Craft energy attacks against the current network in every step, and train on clean and attacked images together.

    Crafting runs in eval mode with frozen parameters and leaves mode, BatchNorm statistics and random state untouched; then one forward pass
    over [x; x'] in train mode, so that both halves share their BatchNorm statistics and DistributedDataParallel sees one pass.

    The parent whose clean decisions are distilled is the network itself at the end of the warm-up (without one: as it starts).

    Args:
        network: the network to defend.
        attack: the attack made in the loop; few steps (default: GradMDM in 3 steps).
        objective: loss over both halves.
        optimization: optimiser and schedule.
        cache: start each image's attack from the perturbation of the epoch before, None from nothing. Needs training images in memory and an attack
            within a ball that returns its last iterate, such as two steps of ``EnergyAttack(space=LinfBall(...), gamma=0, lr=0.75 * eps)``: one
            that returns the best by FLOPs forgets whatever opened no gate yet. The checkpoint of a run on one process holds it; with several
            it starts anew.
        warmup_epochs: epochs of clean training first, since gates must become dynamic before they can be defended; 0 with a trained ``checkpoint``.
        checkpoint: weights to start from: a shipped name or a ``.safetensors`` path of the same architecture.
        channels_last: keep weights and images in that memory format.
    """

    parent_taken: Tensor

    def __init__(
        self,
        network: DynamicNetwork,
        attack: Attack | None = None,
        objective: EnergyAdversarialObjective | None = None,
        optimization: Optimization | None = None,
        *,
        cache: PerturbationCache | None = None,
        warmup_epochs: int = 0,
        checkpoint: str | None = None,
        channels_last: bool = True,
    ) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        both_halves = objective or EnergyAdversarialObjective()
        super().__init__(network, both_halves.clean, optimization, checkpoint=checkpoint, channels_last=channels_last)
        self.attack = attack or GradMDM(steps=3, warmup=0.0, lr=0.03)
        if cache is not None and not isinstance(getattr(self.attack, "space", None), Ball):
            raise ValueError(f"cache needs an attack within a ball, such as EnergyAttack with space LinfBall, got {self.attack.name}")
        self.cache, self.adversarial_objective, self.warmup_epochs = cache, both_halves, warmup_epochs
        # Part of the checkpoint, so that a resumed run distils the same parent.
        self.parent = copy.deepcopy(self.network).requires_grad_(False)
        self.register_buffer("parent_taken", torch.tensor(False))

    def on_train_epoch_start(self) -> None:
        """Take the parent once the warm-up is over; let the cache forget what is due."""
        if self.cache is not None:
            self.cache.begin_epoch(self.current_epoch)
        if self.current_epoch >= self.warmup_epochs and not bool(self.parent_taken):
            self.parent.load_state_dict(self.network.state_dict())
            self.parent_taken.fill_(True)
        self.parent.eval()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the cache: a resumed run must start its attacks where an uninterrupted one would."""
        super().on_save_checkpoint(checkpoint)
        if self.cache is not None:
            checkpoint["perturbation_cache"] = self.cache.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the cache up again."""
        super().on_load_checkpoint(checkpoint)
        if self.cache is not None and self.trainer.world_size == 1 and "perturbation_cache" in checkpoint:
            self.cache.load_state_dict(checkpoint["perturbation_cache"])

    def attacked(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch under attack, (B, 3, H, W)."""
        if self.cache is None:
            return self.attack(self.network, batch.images, batch.labels, ledger=self.ledger).images
        number = batch_idx * self.trainer.world_size + self.global_rank
        crops = crops_of(getattr(self.trainer, "datamodule", None), self.current_epoch, number, len(batch.ids))
        start = self.cache.start(batch.ids, crops, batch.images)
        adversarial = attack_from(start, self.attack, self.network, batch, self.ledger)
        self.cache.keep(batch.ids, crops, adversarial - batch.images)
        return adversarial

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch: clean during the warm-up, clean and attacked afterwards."""
        if self.current_epoch < self.warmup_epochs:
            return super().training_step(batch, batch_idx)
        check_batch(batch, self.num_classes)
        adversarial = self.attacked(batch, batch_idx)
        both = torch.cat([batch.images, adversarial]).contiguous(memory_format=self.memory_format)
        clean, attacked = split_output(self.network(both), [len(batch.images)] * 2)
        parent = None
        if self.adversarial_objective.distillation:
            with torch.no_grad():
                # Here too: a run that is resumed in the middle of an epoch never meets the epoch's beginning.
                parent = self.parent.eval()(batch.images).gates
        return self.total(self.adversarial_objective(clean, attacked, batch.labels, self.ledger, parent))


def attack_from(start: Tensor, attack: Attack, network: DynamicNetwork, batch: Batch, ledger: FlopsLedger) -> Tensor:
    """Attack images that are perturbed already, and bring the sum of both perturbations back into the attack's ball around the clean ones.

    Args:
        start: perturbations to go on from, (B, 3, H, W).
        attack: an attack whose ``space`` is a :class:`~gatewatt.attacks.Ball`.
        network: the network to attack.
        batch: the clean images.
        ledger: prices.
    """
    space = getattr(attack, "space", None)
    assert isinstance(space, Ball)
    begun = (batch.images + space.restrict(batch.images, start)).clamp(0, 1)
    found = attack(network, begun, batch.labels, ledger=ledger).images
    return space.image(batch.images, space.restrict(batch.images, found - batch.images))


def crops_of(data: Any, epoch: int, number: int, count: int) -> Crops:
    """How a training batch was cut from its originals: its :class:`~gatewatt.data.Augmentation` drawn once more.

    Args:
        data: the data module.
        epoch: of the training.
        number: of the batch within the epoch, counted over all processes.
        count: images of the batch.

    Raises:
        ValueError: for images that are not in memory, or that are changed by more than crops and flips.
    """
    images = data.split("train") if isinstance(data, ImageData) else None
    cuts = images.augmentation if isinstance(images, MemoryImages) else None
    if not isinstance(images, MemoryImages) or (cuts is not None and (type(cuts) is not Augmentation or cuts.distortion is not None)):
        raise ValueError("cache needs training images in memory, changed by crops and flips alone: leave it out for this data")
    nothing = torch.zeros(count, dtype=torch.int64)
    if cuts is None:
        return Crops(nothing, nothing, nothing.bool(), 0)
    return Crops(*cuts.draw(count, generator(data.seed, "augmentation", epoch, number)), cuts.crop_padding)
