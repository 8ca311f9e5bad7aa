"""Set the center of A-ViT's halting scores to the network that is about to learn to halt."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch

from gatewatt.flops.pricing import measuring
from gatewatt.networks.avit import AViT, halting_center
from gatewatt.tasks.base import NetworkTask


class HaltingCenter(L.Callback):
    """When training starts, set ``gate_center`` such that halting scores are ``mean`` on average over training images, tokens and layers.

    The published centers fit channel 0 of DeiT's released weights. Any other parent needs its own: too high a center leaves no gradient to
    learn from, too low a one halts every token at once. The center is found by the first process and kept in the network's weights; a resumed
    run keeps the one it has.

    Args:
        mean: average halting score to start from, in (0, 1); 0.01 to 0.05 is sensible.
        images: training images to look at.

    Raises:
        ValueError: if ``images`` is below 1 or ``mean`` outside (0, 1).
        TypeError: when training starts, if the network is no A-ViT.
    """

    def __init__(self, mean: float = 0.03, *, images: int = 512) -> None:
        if not 0 < mean < 1 or images < 1:
            raise ValueError(f"mean must be in (0, 1) and images at least 1, got {mean} and {images}")
        self.mean, self.images = mean, images
        self.center: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The center found, so that a resumed run does not look for another one."""
        return {"center": self.center}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the interrupted run."""
        self.center = state_dict["center"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure and set."""
        assert isinstance(pl_module, NetworkTask)
        network = pl_module.network
        if not isinstance(network, AViT):
            raise TypeError(f"HaltingCenter sets the gate_center of AViT; the network is a {type(network).__name__}")
        if self.center is not None:
            return
        before = network.gate_center.item()
        # Found on every process and taken from the first: their images differ, their networks must not.
        self.center = float(trainer.strategy.broadcast(self.measured(trainer, pl_module, network)))
        network.gate_center.fill_(self.center)
        if trainer.is_global_zero:
            print(f"gate_center {before:g} -> {self.center:.4f}: halting scores of {self.mean:g} on average over {self.images} training images")

    def measured(self, trainer: L.Trainer, task: NetworkTask, network: AViT) -> float:
        """The center for the first training images."""
        data = getattr(trainer, "datamodule", None)
        # A loader of its own, so that the run's keeps its place.
        loader = trainer.train_dataloader if data is None else data.train_dataloader()
        signals, left = [], self.images
        with measuring(network):
            for batch in loader or ():
                images = batch.images[:left].to(task.device)
                signals.append(network.signal(images.contiguous(memory_format=task.memory_format)).flatten().cpu())
                left -= len(images)
                if left <= 0:
                    break
        return halting_center(torch.cat(signals), network.gate_scale, self.mean)
