"""Train the static comparator: one route through a dynamic network for every image, at a given share of its dense FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatewatt.defenses import FixedRoute, Wrapper, bare, busiest_route
from gatewatt.defenses.nesting import lies_within
from gatewatt.defenses.route import route_of
from gatewatt.gating import DynamicNetwork
from gatewatt.objectives import Objective
from gatewatt.tasks.optimize import Optimization
from gatewatt.tasks.train import DynamicTraining


class StaticTraining(DynamicTraining):
    """Freeze the route that a dynamic network's images use most, and train what lies on it.

    A robust dynamic network is worth its gates only if it beats the static network of its own worst-case FLOPs, trained alike. The route is chosen
    before the first step, on training images without augmentation; then the task trains, validates and exports as
    :class:`~gatewatt.tasks.DynamicTraining` does, and FLOPs fractions are those of the route, hence 1. The card of the exported weights names the
    route: ``FixedRoute(load(FILE), FILE)`` is the trained network again, and so is this task with that checkpoint.

    Args:
        network: the dynamic network, behind no defense: the route is the one that its card names.
        budget: share of its dense FLOPs that the route may cost, in (0, 1]; give the robust network's worst case.
        objective: training loss (default: cross entropy).
        optimization: optimiser and schedule.
        images: training images over which a gate's use is averaged.
        from_scratch: train new weights; the checkpoint then only chooses the route.
        checkpoint: weights to start from: a shipped name or a ``.safetensors`` path of the same architecture. Of a static network the route is kept,
            whatever the budget. Without a checkpoint untrained gates choose, so the route is arbitrary.
        size: side of the images in pixels.
        channels_last: keep weights and images in that memory format.

    Raises:
        ValueError: for a defended network, a budget out of range or without room for a gate, or data that has no training images of
            :mod:`gatewatt.data`.
    """

    network: FixedRoute

    def __init__(
        self,
        network: DynamicNetwork,
        budget: float,
        objective: Objective | None = None,
        optimization: Optimization | None = None,
        *,
        images: int = 256,
        from_scratch: bool = False,
        checkpoint: str | None = None,
        size: int = 32,
        channels_last: bool = True,
    ) -> None:
        if not 0 < budget <= 1:
            raise ValueError(f"budget must be in (0, 1], a share of the dense FLOPs, got {budget}")
        if isinstance(network, Wrapper):
            raise ValueError(f"the route of a static network is fixed without a defense, got {type(network).__name__}: train without, test behind it")
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        fresh = copy.deepcopy(network.state_dict()) if from_scratch else None
        kept = None if checkpoint is None else route_of(checkpoint)
        # All gates open until there is data to choose by: from the start this is a static network's task, for a run that is resumed, too.
        route = FixedRoute(network, kept or tuple(lies_within(network, size)), size=size)
        super().__init__(route, objective, optimization, checkpoint=checkpoint, channels_last=channels_last)
        self.budget, self.images, self.size, self.fresh = budget, images, size, fresh
        self.chosen = kept is not None

    def setup(self, stage: str) -> None:
        """Choose the route, once."""
        inner = bare(self.network)
        if not self.chosen:
            self.take(busiest_route(inner, self.choosing_images(), self.budget))
        if self.fresh is not None:
            inner.load_state_dict(self.fresh)
            self.fresh = None

    def take(self, route: Sequence[str]) -> None:
        """Keep these gates open and no others."""
        # What an earlier route left out is trained again.
        inner = bare(self.network).requires_grad_(True)
        self.network, self.chosen = FixedRoute(inner, route, size=self.size), True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the route."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["route"] = list(self.network.settings["open_gates"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the route up again, which another machine's rounding might have chosen otherwise."""
        super().on_load_checkpoint(checkpoint)
        self.take(checkpoint["route"])

    def choosing_images(self) -> Tensor:
        """The images that the route is chosen on, (B, 3, H, W)."""
        return torch.cat(list(self.training_images(self.images, purpose="a static network's route is chosen on")))
