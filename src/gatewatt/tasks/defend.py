"""Energy-adversarial training: every batch is attacked in the loop, and the network trains on both halves at once."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from gatewatt.attacks import Attack, GradMDM
from gatewatt.data.batch import Batch
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
        warmup_epochs: int = 0,
        checkpoint: str | None = None,
        channels_last: bool = True,
    ) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        both_halves = objective or EnergyAdversarialObjective()
        super().__init__(network, both_halves.clean, optimization, checkpoint=checkpoint, channels_last=channels_last)
        self.attack = attack or GradMDM(steps=3, warmup=0.0, lr=0.03)
        self.adversarial_objective, self.warmup_epochs = both_halves, warmup_epochs
        # Part of the checkpoint, so that a resumed run distils the same parent.
        self.parent = copy.deepcopy(self.network).requires_grad_(False)
        self.register_buffer("parent_taken", torch.tensor(False))

    def on_train_epoch_start(self) -> None:
        """Take the parent once the warm-up is over."""
        if self.current_epoch >= self.warmup_epochs and not bool(self.parent_taken):
            self.parent.load_state_dict(self.network.state_dict())
            self.parent_taken.fill_(True)
        self.parent.eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch: clean during the warm-up, clean and attacked afterwards."""
        if self.current_epoch < self.warmup_epochs:
            return super().training_step(batch, batch_idx)
        check_batch(batch, self.num_classes)
        adversarial = self.attack(self.network, batch.images, batch.labels, ledger=self.ledger).images
        both = torch.cat([batch.images, adversarial]).contiguous(memory_format=self.memory_format)
        clean, attacked = split_output(self.network(both), [len(batch.images)] * 2)
        parent = None
        if self.adversarial_objective.distillation:
            with torch.no_grad():
                # Here too: a run that is resumed in the middle of an epoch never meets the epoch's beginning.
                parent = self.parent.eval()(batch.images).gates
        return self.total(self.adversarial_objective(clean, attacked, batch.labels, self.ledger, parent))
