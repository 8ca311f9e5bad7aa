"""Energy-adversarial training: every batch is attacked in the loop, and the network trains on both halves at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gatewatt.attacks import Attack, Ball, ConflictMasking, EnergyAttack, GradMDM, ProjectedAttack
from gatewatt.data import Augmentation, ImageData, MemoryImages
from gatewatt.data.batch import Batch
from gatewatt.data.order import generator
from gatewatt.defenses import Crops, PerturbationCache, Wrapper, bare
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, split_output
from gatewatt.objectives import EnergyAdversarialObjective
from gatewatt.tasks.evaluate import check_batch
from gatewatt.tasks.optimize import Optimization
from gatewatt.tasks.train import DynamicTraining


class AttackMix:
    """What differs from attack to attack in the loop, so that the network does not learn to withstand a single one.

    Args:
        keep: share of the images that are to spend more and to stay classified right.
        mislead: share of the images that are to spend more and to be misclassified as well: those that only spend more leave accuracy undefended.
        aim: what the prediction weighs in these two, in lengths of the gates' gradient, positive.
        masking: share of the batches whose attack follows :class:`~gatewatt.attacks.ConflictMasking` instead of its own direction, at one more
            input-gradient a step.
        random_start: start at a random point of the ball, the images that a cache knows nothing of and its restarts included.

    Raises:
        ValueError: for a share outside [0, 1], or an aim that is not positive.
    """

    def __init__(self, *, keep: float = 0.2, mislead: float = 0.2, aim: float = 1.0, masking: float = 0.5, random_start: bool = True) -> None:
        if not (0 <= keep and 0 <= mislead and keep + mislead <= 1):
            raise ValueError(f"keep and mislead must be shares of the images, together at most 1, got {keep} and {mislead}")
        if not aim > 0:
            raise ValueError(f"aim must be positive, got {aim}; without further aims set keep and mislead to 0")
        if not 0 <= masking <= 1:
            raise ValueError(f"masking must be in [0, 1], a share of the batches, got {masking}")
        self.keep, self.mislead, self.aim, self.masking, self.random_start = keep, mislead, aim, masking, random_start

    def vary(self, attack: EnergyAttack, count: int, step: int, draws: torch.Generator) -> EnergyAttack:
        """The attack of one batch.

        Args:
            attack: as it was given.
            count: images of the batch.
            step: of the training. Masking comes in turn, at the same steps on all processes: those with masking take longer.
            draws: where each image's aim is drawn from.
        """
        varied = copy.copy(attack)
        if int(self.masking * (step + 1)) > int(self.masking * step):
            varied.direction = ConflictMasking()
        if self.keep + self.mislead == 0:
            return varied
        drawn = torch.rand(count, generator=draws)
        kept, misled = drawn < self.keep, (drawn >= self.keep) & (drawn < self.keep + self.mislead)
        return varied.aimed(self.aim * (kept.float() - misled.float()))

    def start(self, space: Ball, images: Tensor, draws: torch.Generator) -> Tensor:
        """Perturbations to start from, (B, 3, H, W)."""
        if not self.random_start:
            return torch.zeros_like(images)
        return space.within(torch.rand(images.shape, generator=draws).to(images))


class EnergyAdversarialTraining(DynamicTraining):
    """Craft energy attacks against the current network in every step, and train on clean and attacked images together.

    Crafting runs in eval mode with frozen parameters and leaves mode, BatchNorm statistics and random state untouched; then one forward pass
    over [x; x'] in train mode, so that both halves share their BatchNorm statistics and DistributedDataParallel sees one pass.

    The parent whose clean decisions are distilled is the network itself at the end of the warm-up (without one: as it starts). Where the objective
    has a ``ramp``, the radius of the attack and the length of its steps rise with it.

    Args:
        network: the network to defend.
        attack: the attack made in the loop; few steps (default: GradMDM in 3 steps), of which the last iterate counts.
        objective: loss over both halves.
        optimization: optimiser and schedule.
        cache: start each image's attack from the perturbation of the epoch before, None from nothing. Needs training images in memory and an attack
            within a ball that returns its last iterate, such as two steps of ``EnergyAttack(space=LinfBall(...), gamma=0, lr=0.75 * eps)``: one
            that returns the best by FLOPs forgets whatever opened no gate yet. The checkpoint of a run on one process holds it; with several
            it starts anew.
        mix: what differs from attack to attack, None for nothing; for an ``EnergyAttack`` within a ball that returns its last iterate.
        warmup_epochs: epochs of clean training first, since gates must become dynamic before they can be defended; 0 with a trained ``checkpoint``.
            A share of the run instead: the objective's ``ramp``.
        defense: what the network is attacked, trained and measured behind, as its parent, see :class:`~gatewatt.tasks.base.NetworkTask`; exported is
            the network inside.
        parent_defense: what the parent decides behind instead. With a guard of a little more budget and an objective that distils what was
            ``executed``, the network asks for hardly more than its own guard lets through.
        checkpoint: weights to start from: a shipped name or a ``.safetensors`` path of the same architecture.
        channels_last: keep weights and images in that memory format.

    Raises:
        ValueError: if ``warmup_epochs`` is negative, or ``cache``, ``mix`` or a ramp do not go with the attack.
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
        mix: AttackMix | None = None,
        warmup_epochs: int = 0,
        defense: Callable[[DynamicNetwork], Wrapper] | None = None,
        parent_defense: Callable[[DynamicNetwork], Wrapper] | None = None,
        checkpoint: str | None = None,
        channels_last: bool = True,
    ) -> None:
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        both_halves = objective or EnergyAdversarialObjective()
        super().__init__(network, both_halves.clean, optimization, defense=defense, checkpoint=checkpoint, channels_last=channels_last)
        self.attack = attack or GradMDM(steps=3, warmup=0.0, lr=0.03)
        asked = {"cache": cache is not None, "mix": mix is not None, "ramp": both_halves.ramp[1] > 0}
        check_fit(self.attack, [name for name, wanted in asked.items() if wanted])
        self.cache, self.mix, self.adversarial_objective, self.warmup_epochs = cache, mix, both_halves, warmup_epochs
        # Part of the checkpoint, so that a resumed run distils the same parent.
        parent = copy.deepcopy(self.network)
        self.parent = (parent if parent_defense is None else parent_defense(bare(parent))).requires_grad_(False)
        self.register_buffer("parent_taken", torch.tensor(False))

    def on_train_epoch_start(self) -> None:
        """Let the cache forget what is due."""
        if self.cache is not None:
            self.cache.begin_epoch(self.current_epoch)
        self.parent.eval()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tell both objectives how far the run is; take the parent once the warm-up is over."""
        super().on_train_batch_start(batch, batch_idx)
        self.adversarial_objective.progress = self.objective.progress
        if not self.warming and not bool(self.parent_taken):
            self.parent.load_state_dict(self.network.state_dict())
            self.parent_taken.fill_(True)

    @property
    def warming(self) -> bool:
        """Whether batches are still clean."""
        return self.current_epoch < self.warmup_epochs or self.adversarial_objective.strength() == 0

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
        attack = shrunk(self.attack, self.adversarial_objective.strength())
        if self.cache is None and self.mix is None:
            return attack(self.network, batch.images, batch.labels, ledger=self.ledger).images
        start = torch.zeros_like(batch.images)
        if self.mix is not None:
            # The step's own seed, apart from the generator that the network draws from: a mix changes nothing but the attacks.
            draws = generator("mix", torch.initial_seed(), batch_idx)
            assert isinstance(attack, EnergyAttack)
            attack = self.mix.vary(attack, len(start), self.global_step, draws)
            start = self.mix.start(ball_of(attack), start, draws)
        if self.cache is None:
            return attack_from(start, attack, self.network, batch, self.ledger)
        number = batch_idx * self.trainer.world_size + self.global_rank
        crops = crops_of(getattr(self.trainer, "datamodule", None), self.current_epoch, number, len(batch.ids))
        adversarial = attack_from(self.cache.start(batch.ids, crops, start), attack, self.network, batch, self.ledger)
        self.cache.keep(batch.ids, crops, adversarial - batch.images)
        return adversarial

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One batch: clean during the warm-up, clean and attacked afterwards."""
        if self.warming:
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


def check_fit(attack: Attack, asked: list[str]) -> None:
    """Raise unless the attack in the loop goes with everything that is asked of it: ``cache``, ``mix``, ``ramp``.

    Raises:
        ValueError: naming the first that does not.
    """
    for name in asked:
        if not isinstance(getattr(attack, "space", None), Ball) or (name == "mix" and not isinstance(attack, EnergyAttack)):
            raise ValueError(f"{name} needs an attack within a ball, such as EnergyAttack with space LinfBall, got {attack.name}")
        keeps_best = getattr(attack, "keep", "best" if isinstance(attack, ProjectedAttack) else "last") == "best"
        if name != "ramp" and keeps_best:
            # The best by FLOPs is where the image started unless a gate opened, so two steps a batch would never add up.
            raise ValueError(f"{name} needs an attack that returns its last iterate, and {attack.name} returns the best by FLOPs; set keep to last")


def ball_of(attack: Attack) -> Ball:
    """Where the perturbations of the attack lie."""
    space = getattr(attack, "space", None)
    assert isinstance(space, Ball)
    return space


def shrunk(attack: Attack, share: float) -> Attack:
    """The attack in a ball of ``share`` times the radius, and with steps shortened alike; an attack without a ball for a share of 1."""
    if share == 1:
        return attack
    smaller: Any = copy.copy(attack)
    smaller.space = ball_of(attack).scaled(share)
    if hasattr(attack, "lr"):  # else steps are counted in radii already
        smaller.lr = share * smaller.lr
    return smaller


def attack_from(start: Tensor, attack: Attack, network: DynamicNetwork, batch: Batch, ledger: FlopsLedger) -> Tensor:
    """Attack images that are perturbed already, and bring the sum of both perturbations back into the attack's ball around the clean ones.

    Args:
        start: perturbations to go on from, (B, 3, H, W).
        attack: an attack whose ``space`` is a :class:`~gatewatt.attacks.Ball`.
        network: the network to attack.
        batch: the clean images.
        ledger: prices.
    """
    space = ball_of(attack)
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
