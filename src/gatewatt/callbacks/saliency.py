"""Calibrate ManiDP's saliency thresholds during training, epoch by epoch (Tang et al., CVPR 2021; section 5.2 of the specification)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from gatewatt.data.batch import Batch
from gatewatt.flops import measuring
from gatewatt.gating import DynamicOutput, Execution
from gatewatt.networks.manidp import ManiDP
from gatewatt.objectives.manifold import ManifoldPruning
from gatewatt.tasks.train import DynamicTraining

FLATTEST = 1e-4  # the smallest spread: a layer that answers every image alike must not divide by 0


def remaining_rate(epoch: int, epochs: int, target: float) -> float:
    """Share of channels to keep after an epoch, counted from 0: half a cosine from 1 down to ``target`` after the last one.

    Example:
        >>> [round(remaining_rate(epoch, 4, 0.6), 3) for epoch in range(4)]
        [0.941, 0.8, 0.659, 0.6]
    """
    return (1 - target) / 2 * math.cos(math.pi * (epoch + 1) / epochs) + (1 + target) / 2


def threshold_of(means: Tensor, rate: float) -> Tensor:
    """The ceil(rate C)-th largest of C channel means.

    Example:
        >>> threshold_of(torch.tensor([0.1, 0.4, 0.2, 0.3]), 0.5).item() == torch.tensor(0.3).item()
        True
    """
    # A product such as 0.1 * 30 is rounded up to just above its whole number.
    kept = min(len(means), max(1, math.ceil(rate * len(means) - 1e-9)))
    return means.topk(kept).values[-1]


class SaliencySums:
    """Sums over images, in float64: what thresholds, spreads and the reference cross entropy follow from.

    Attributes:
        totals: ``images``, ``cross_entropy``, and per gate ``saliency/<gate>`` (C,) and ``response/<gate>``, sum and sum of squares over images
            and channels.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}

    def add(self, output: DynamicOutput, labels: Tensor) -> None:
        """Add the first ``len(labels)`` images of an output, those that the labels belong to."""
        count, logits = len(labels), output.logits.detach()
        new = {
            "images": logits.new_tensor(count, dtype=torch.float64),
            "cross_entropy": functional.cross_entropy(logits[:count].double(), labels, reduction="sum"),
        }
        for name in output.gates:
            response = output.aux[f"response/{name}"][:count].detach().double()
            new[f"saliency/{name}"] = output.aux[f"saliency/{name}"][:count].detach().sum(0, dtype=torch.float64)
            new[f"response/{name}"] = torch.stack([response.sum(), response.square().sum()])
        for name, value in new.items():
            # A resumed run's sums come from the CPU.
            self.totals[name] = value + self.totals[name].to(value.device) if name in self.totals else value

    def over_processes(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """The sums over all processes."""
        return {name: torch.as_tensor(trainer.strategy.reduce(value, reduce_op="sum")) for name, value in self.totals.items()}


class SaliencyCalibration(L.Callback):
    """Set the thresholds of a :class:`~gatewatt.networks.manidp.ManiDP` after each training epoch, and its objective's reference.

    After epoch e >= 1, counted from 0, the threshold of a mask block is the ceil(rho_e C)-th largest of its C channels' mean saliencies over the
    epoch's training steps, rho_e falling along half a cosine to ``rate``: the rate holds for channel means, and how many channels an image keeps
    is its own. Sums begin anew in every epoch and run over all processes. The standard deviation of the responses, with which the gate scores
    are scaled, is set at the same moments.

    The sums are gathered while the weights move. After the last epoch the thresholds are therefore taken once more, from a pass over the
    training batches with the final weights in eval mode, and before the last validation, which so measures the network as it is left.

    With :class:`~gatewatt.objectives.manifold.ManifoldPruning` it also keeps the mean cross entropy of the epoch before; for the first epoch
    that of the static parent (a dense pass over the training batches). Attacked images of a defence in the loop are not counted.

    Args:
        rate: share of channels to keep in the end, in (0, 1]; 0.6 is the published ResNet-56 command's.
        batches: training batches of each process for the two extra passes; None for a whole epoch of them.

    Raises:
        ValueError: if a value is out of range, or the trainer does not say how many epochs the rate falls over.
        TypeError: if the network is not a ManiDP.
    """

    def __init__(self, rate: float = 0.6, *, batches: int | None = None) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], a share of the channels, got {rate}")
        if batches is not None and batches < 1:
            raise ValueError(f"batches must be at least 1, got {batches}; leave it out for a whole epoch")
        self.rate, self.batches = rate, batches
        self.sums = SaliencySums()
        self.reference: float | None = None
        self._labels: Tensor | None = None
        self._hook: RemovableHandle | None = None
        self._open_epoch: int | None = None  # epoch of the last step, until a pass with its weights has set the thresholds

    def state_dict(self) -> dict[str, Any]:
        """Reference and sums so far. With several processes the sums are those of the first one, for the rest of that epoch."""
        return {"reference": self.reference, "totals": dict(self.sums.totals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the interrupted epoch."""
        self.reference, self.sums.totals = state_dict["reference"], dict(state_dict["totals"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Watch the network's training passes; measure the first reference, unless the run is resumed."""
        network = masked_network(pl_module)
        if trainer.max_epochs is None or trainer.max_epochs < 1:
            raise ValueError(f"the rate of channels falls over the epochs of the run: set trainer.max_epochs, got {trainer.max_epochs}")
        if isinstance(objective_of(pl_module), ManifoldPruning) and self.reference is None:
            first = self._pass(trainer, pl_module, "dense").over_processes(trainer)
            self.reference = float(first["cross_entropy"] / first["images"])
        self._share(pl_module)
        self._hook = network.register_forward_hook(self._watch)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        """Keep the labels of the step, for its cross entropy."""
        self._labels = batch.labels

    def _watch(self, module: nn.Module, inputs: tuple[Any, ...], output: DynamicOutput) -> None:
        # Attacks in the loop run the network in eval mode.
        if module.training and self._labels is not None:
            self.sums.add(output, self._labels)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Calibrate at the end of an epoch: not in a later hook, since the epoch's validation comes first."""
        self._open_epoch = epoch = trainer.current_epoch
        ended = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        if (ended and epoch + 1 >= epochs_of(trainer)) or 0 <= trainer.max_steps <= trainer.global_step:
            self._finish(trainer, pl_module, epoch)
        elif ended:
            totals, self.sums = self.sums.over_processes(trainer), SaliencySums()
            self.reference = float(totals["cross_entropy"] / totals["images"])
            self._share(pl_module)
            if epoch >= 1:
                self._calibrate(trainer, pl_module, totals, epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Finish a run that was stopped early; its last validation was before that."""
        if self._open_epoch is not None:
            self._finish(trainer, pl_module, self._open_epoch)
        self._leave()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._leave()

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: int) -> None:
        self.sums, self._open_epoch = SaliencySums(), None
        self._calibrate(trainer, pl_module, self._pass(trainer, pl_module, "masked").over_processes(trainer), epoch)

    def _calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule, totals: dict[str, Tensor], epoch: int) -> None:
        rate, images = remaining_rate(epoch, epochs_of(trainer), self.rate), totals["images"]
        with torch.no_grad():
            for name, block in masked_network(pl_module).masks.items():
                means = totals[f"saliency/{name}"] / images
                mean, square = totals[f"response/{name}"] / (images * len(means))
                block.xi.copy_(threshold_of(means, rate))
                block.spread.copy_((square - mean**2).clamp_min(0).sqrt().clamp_min(FLATTEST))

    def _pass(self, trainer: L.Trainer, pl_module: L.LightningModule, execution: Execution) -> SaliencySums:
        """Sums over training batches with the weights as they are, in eval mode and float32."""
        sums, network = SaliencySums(), masked_network(pl_module)
        # A loader draws from the global generator to seed its workers; training must not see that.
        with measuring(network), torch.random.fork_rng(devices=[]):
            for batch in self._training_batches(trainer):
                sums.add(network(batch.images, execution), batch.labels)
        return sums

    def _training_batches(self, trainer: L.Trainer) -> Iterator[Batch]:
        data = getattr(trainer, "datamodule", None)
        # A loader of its own where there is a data module: the trainer's may be in the middle of an epoch.
        loader: Any = trainer.train_dataloader if data is None else data.train_dataloader()
        count = min(trainer.num_training_batches, math.inf if self.batches is None else self.batches)
        for batch in islice(loader, None if math.isinf(count) else int(count)):
            yield trainer.strategy.batch_to_device(batch)

    def _share(self, pl_module: L.LightningModule) -> None:
        objective = objective_of(pl_module)
        if isinstance(objective, ManifoldPruning):
            objective.reference = self.reference

    def _leave(self) -> None:
        self._labels = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def masked_network(pl_module: L.LightningModule) -> ManiDP:
    """The network of a task, which must be one that has saliencies."""
    assert isinstance(pl_module, DynamicTraining)
    if not isinstance(pl_module.network, ManiDP):
        raise TypeError(f"SaliencyCalibration sets the thresholds of a ManiDP, and the network is a {type(pl_module.network).__name__}")
    return pl_module.network


def objective_of(pl_module: L.LightningModule) -> object:
    """The objective of a training task, on clean images."""
    assert isinstance(pl_module, DynamicTraining)
    return pl_module.objective


def epochs_of(trainer: L.Trainer) -> int:
    """Epochs of the run; checked when it starts."""
    assert trainer.max_epochs is not None
    return trainer.max_epochs
