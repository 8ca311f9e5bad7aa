"""Calibrate a cascade's exits to a budget: which share of the images each stage may answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from torch import Tensor

from gatewatt.data.loader import BatchLoader
from gatewatt.data.module import ImageData
from gatewatt.data.order import BatchOrder, generator
from gatewatt.data.splits import subset
from gatewatt.flops import measuring
from gatewatt.gating import check_finite, exit_score
from gatewatt.networks.dvt import DVT
from gatewatt.tasks.base import NetworkTask

# Below this, 1 - doubt is no longer told from 1; whatever leaves less doubt stops.
SMALLEST_DOUBT = 1e-12


class ExitBudget(L.Callback):
    """Set the exits of a :class:`~gatewatt.networks.DVT` so that stage k answers a share of the images proportional to p^k (Wang et al. 2021).

    T_k is chosen on training images so that, of those that have not left yet, the most confident ones leave at stage k. Before every
    validation of a fit, so that it measures the calibrated network, and once more after the last step if weights changed since. All
    processes measure their share of the images and set the same thresholds, those of a single process. Logged: ``val/confidence1`` and
    ``val/confidence2``, T_1 and T_2.

    Mended: the original calibrates on augmented images, and so on less confident ones than it is tested on; here they are clean. A network
    is still surer about images that it was trained on, so fewer test images than p promises leave early.

    Args:
        p: below 1 prefers early exits, above 1 late ones; 1 gives thirds. The original spans 1/20 to 59/20.
        images: calibrate on the first so many training images of a seeded permutation, or on all if there are fewer; None for all.

    Raises:
        ValueError: if ``p`` is not a positive number or ``images`` below 2.
        TypeError: at the start of a fit, for a network other than DVT or data that is not a module of :mod:`gatewatt.data`.
    """

    def __init__(self, p: float = 1.0, *, images: int | None = 50_000) -> None:
        self.shares = shares(p)
        if images is not None and images < 2:
            raise ValueError(f"images must be at least 2, got {images}; leave it out for 50,000")
        self.p, self.images = p, images
        self.calibrated_at: int | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what cannot be calibrated before anything is trained."""
        network_and_data(trainer, pl_module)
        self.calibrated_at = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate before every validation of a fit but the sanity check."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        confidence = self.calibrate(trainer, pl_module)
        names = (f"val/confidence{stage}" for stage in range(1, len(confidence) + 1))
        # Equal on all processes, so there is nothing to average.
        pl_module.log_dict(dict(zip(names, confidence.tolist(), strict=True)), batch_size=1, rank_zero_only=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate the trained network, unless the last validation did."""
        if self.calibrated_at != trainer.global_step:
            self.calibrate(trainer, pl_module)

    def calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
        """Measure the doubt of every exit and set the network's thresholds.

        Returns:
            T_k of every exit but the last, float64 (E - 1,).

        Raises:
            ValueError: if logits are not finite; the thresholds are then as they were.
        """
        network, data = network_and_data(trainer, pl_module)
        doubts = self._doubts(trainer, pl_module, network, data)
        with torch.no_grad():
            network.doubt.copy_(thresholds(doubts, self.shares))
        self.calibrated_at = trainer.global_step
        return network.confidence

    def _doubts(self, trainer: L.Trainer, pl_module: L.LightningModule, network: DVT, data: ImageData) -> Tensor:
        """Doubt of every exit but the last about the chosen images, (N, E - 1), the same on every process."""
        assert isinstance(pl_module, NetworkTask)
        training = data.split("train")
        count = None if self.images is None or self.images >= len(training) else self.images
        chosen = subset(len(training), count, data.split_seed)
        loader = BatchLoader(
            training.augmented(None),
            sampler=BatchOrder(chosen, data.eval_batch_size),
            batch_size=None,
            num_workers=data.workers,
            generator=generator(data.seed, "budget"),
        )
        place = torch.empty(len(training), dtype=torch.int64).index_copy(0, chosen, torch.arange(len(chosen)))
        doubts = torch.zeros(len(chosen), len(network.doubt), device=pl_module.device)
        with measuring(network):
            for batch in loader:
                output = network(batch.images.to(pl_module.device).contiguous(memory_format=pl_module.memory_format))
                check_finite(output)
                assert output.exits is not None
                doubts[place[batch.ids].to(doubts.device)] = torch.cat([doubt(logits) for logits in output.exits[:, :-1].unbind(1)], dim=1)
        # Every row is measured by one process and zero on the others: their sum is exact.
        return trainer.strategy.reduce(doubts, reduce_op="sum")


def network_and_data(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[DVT, ImageData]:
    """What is calibrated, and on what.

    Raises:
        TypeError: if it is something else.
    """
    network, data = getattr(pl_module, "network", None), getattr(trainer, "datamodule", None)
    if not isinstance(network, DVT):
        raise TypeError(f"ExitBudget calibrates the exits of a DVT, got {type(network).__name__}; leave the callback out")
    if not isinstance(data, ImageData):
        raise TypeError(f"ExitBudget calibrates on clean training images of a module of gatewatt.data, got {type(data).__name__}")
    return network, data


def doubt(logits: Tensor) -> Tensor:
    """1 - max softmax of logits (B, K), (B, 1), as exactly as the gate computes it."""
    score = exit_score(logits, 0.0)  # d / (d + 1)
    return score / (1 - score)


def shares(p: float, stages: int = 3) -> list[float]:
    """The share of the images that each stage answers, proportional to p, p^2, ..., adding up to 1.

    Raises:
        ValueError: if p is not a positive number, or so extreme that no images would be left for a stage.

    Example:
        >>> [round(share, 3) for share in shares(0.5)]
        [0.571, 0.286, 0.143]
    """
    if not 1e-3 <= p <= 1e3:
        raise ValueError(f"p must be in [0.001, 1000] (the original spans 1/20 to 59/20), got {p}")
    parts = [p**stage for stage in range(1, stages + 1)]
    return [part / math.fsum(parts) for part in parts]


def thresholds(doubts: Tensor, shares: Sequence[float]) -> Tensor:
    """The doubt 1 - T_k from which on an image goes on, for every exit but the last.

    Args:
        doubts: of the exits, (N, E - 1).
        shares: of the images that each of the E stages answers, adding up to 1. Met up to rounding to whole images; images whose doubts are
            equal cannot be parted and go on together.

    Returns:
        (E - 1,), each halfway between the last image that leaves and the first that goes on.

    Example:
        >>> doubts = torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.4, 0.3], [0.6, 0.2]])
        >>> [round(value, 6) for value in thresholds(doubts, [0.5, 0.25, 0.25]).tolist()]
        [0.3, 0.25]
    """
    doubts = doubts.double()
    limits, going, left = [], torch.arange(len(doubts), device=doubts.device), 0
    for stage in range(doubts.shape[1]):
        # Somebody always goes on: an exit that nobody passes would leave the next one without an image to be calibrated on.
        leaving = min(max(round(math.fsum(shares[: stage + 1]) * len(doubts)) - left, 0), len(going) - 1)
        ordered = doubts[going, stage].sort().values
        limit = (ordered[leaving - 1] + ordered[leaving]) / 2 if leaving else ordered[0] / 2
        limit = limit.clamp_min(SMALLEST_DOUBT).float()
        limits.append(limit)
        passed = going[doubts[going, stage] >= limit]
        left += len(going) - len(passed)
        going = passed if len(passed) else going
    return torch.stack(limits)
