"""A-ViT's loss: cross entropy, the cost of pondering, and a prior on the layers where tokens halt.

Yin et al., "A-ViT" (CVPR 2022), Eqs. 8-11. The prior compares how the halting scores are spread over the layers with a Gaussian around a
target layer, by the Kullback-Leibler divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput
from gatewatt.objectives.base import CrossEntropy, Objective, Terms

CLAMP = (0.01, 0.99)
REACHED = 0.98
"""Share of the released target that lies before its center."""


def layer_prior(layers: int, center: float, spread: float = 1.0, *, released: bool = False) -> Tensor:
    """A Gaussian over the layer indices 0 .. L - 1, (L,), float32.

    Args:
        layers: number of layers L.
        center: index of the layer where tokens should halt, in (0, L - 1].
        spread: standard deviation in layers.
        released: scale it as the authors' release does, so that the indices before ``center`` add up to 0.98; the whole then adds up to 3.26
            for L = 12 and is no distribution. Otherwise it adds up to 1.

    Example:
        >>> [round(value, 4) for value in layer_prior(12, 8, released=True).tolist()[4:]]
        [0.0004, 0.0145, 0.1761, 0.789, 1.3009, 0.789, 0.1761, 0.0145]
        >>> round(layer_prior(12, 8).sum().item(), 6)
        1.0
    """
    index = torch.arange(layers, dtype=torch.float64)
    density = (-((index - center) ** 2) / (2 * spread**2)).exp()
    scale = REACHED / density[index < center].sum() if released else 1 / density.sum()
    return (scale * density).float()


class HaltingPrior(Objective):
    """``CE + ponder * mean(N + R) + prior * KL(target || spread of halting over the layers) / L`` for A-ViT.

    The spread is the mean halting score after each layer, over the patch tokens that are alive there and all images of the batch, divided by
    its sum and clamped to [0.01, 0.99]. The original drops the first image instead of the class token (a slice on the wrong axis) and counts
    the meaningless scores of dead tokens; that is not imitated.

    The defaults of both weights are the README's of the authors' release; its command line has 1e-3 and 1e-2.

    Args:
        ponder: weight of the mean ponder cost.
        prior: weight of the divergence. As in the release it is divided by the number of layers.
        center: index of the layer where tokens should halt, counted from 0; the default is 8 of 12, scaled with the depth of the network.
        spread: standard deviation of the target in layers.
        released: as the release: a target that adds up to more than 1 (:func:`layer_prior`), a spread not normalised again after the clamp,
            and the divergence left out where it is negative. Otherwise both are distributions, and the divergence is one.
        label_smoothing: of the cross entropy, in [0, 1). The release trains on soft labels of mixup.

    Raises:
        ValueError: for a value out of range, or if the network's output does not say how its tokens halted.
    """

    def __init__(
        self,
        ponder: float = 5e-4,
        prior: float = 1e-3,
        *,
        center: float | None = None,
        spread: float = 1.0,
        released: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        if ponder < 0 or prior < 0:
            raise ValueError(f"ponder and prior must be at least 0, got {ponder} and {prior}")
        if not spread > 0 or (center is not None and not center > 0):
            raise ValueError(f"center and spread must be positive, in layers, got {center} and {spread}")
        self.ponder, self.prior, self.center, self.spread, self.released = ponder, prior, center, spread, released
        self.prediction = CrossEntropy(label_smoothing)

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``cross_entropy``, ``ponder`` and ``prior``."""
        missing = [name for name in ("ponder", "halting", "live") if name not in output.aux]
        if missing:
            raise ValueError(f"the network's output lacks {', '.join(missing)} in aux; HaltingPrior trains A-ViT, whose tokens halt")
        return {
            **self.prediction(output, labels, ledger),
            "ponder": self.ponder * output.aux["ponder"].mean(),
            "prior": self.prior * self.divergence(output.aux["halting"], output.aux["live"]),
        }

    def divergence(self, halting: Tensor, live: Tensor) -> Tensor:
        """KL divergence of the spread over layers from the target, divided by L.

        Args:
            halting: mean halting score of each image after each layer, (B, L).
            live: number of tokens that each mean is over, (B, L).
        """
        layers = halting.shape[1]
        center = self.center if self.center is not None else layers * 2 / 3
        if center > layers - 1:
            raise ValueError(f"center must be the index of a layer, at most {layers - 1} for this network, got {center}")
        target = layer_prior(layers, center, self.spread, released=self.released).to(halting)
        mean = (halting * live).sum(0) / live.sum(0).clamp_min(1)
        # Untrained scores may be as small as 1e-33; only where nothing halts at all is there nothing to divide by.
        found = (mean / mean.sum().clamp_min(torch.finfo(mean.dtype).tiny)).clamp(*CLAMP)
        if not self.released:
            found = found / found.sum()
        divergence = (torch.special.xlogy(target, target) - target * found.log()).sum() / layers
        return divergence.clamp_min(0) if self.released else divergence
