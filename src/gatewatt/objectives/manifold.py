"""The loss of ManiDP: images that are easy, or look alike, are to be computed sparsely, respectively alike.

Tang et al., "Manifold Regularized Dynamic Network Pruning" (CVPR 2021), the complexity and the similarity regularisation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput
from gatewatt.objectives.base import Objective, Terms


class ManifoldPruning(Objective):
    """Cross entropy + ``lasso sum_l mean_b(w_b mean_c pi_lbc)`` + ``graph sum_l |R(pi_l) - R(F_l)|^2 / B^2``.

    pi_l is the saliency at mask block l and F_l the pooled features that it masks, (B, C); R is the matrix of cosine similarities between the
    images of the batch. The weight ``w_b = max((T - CE_b) / T, 1e-10)^gamma`` where CE_b < T, else 0, makes images sparse in proportion to how
    easy they are; ``T = easy x reference``, the mean cross entropy of the previous epoch's training steps. Unlike in the original's code w_b
    carries no gradient, which would push the cross entropy of easy images up.

    Args:
        lasso: weight of the complexity term. The defaults are those of the published ResNet-56 command (the code's own are 0.1 and 0.1).
        graph: weight of the similarity term.
        easy: share of the reference below which an image counts as easy.
        gamma: exponent of w_b, above 0.

    Attributes:
        reference: mean cross entropy of the epoch before. It is kept, through a resume as well, and set by
            :class:`~gatewatt.callbacks.saliency.SaliencyCalibration`.

    Raises:
        ValueError: if a weight is negative, or ``easy`` or ``gamma`` not positive.
    """

    reference: float | None = None

    def __init__(self, lasso: float = 5e-3, graph: float = 1.0, *, easy: float = 0.5, gamma: float = 1.0) -> None:
        if not 0 <= lasso < math.inf or not 0 <= graph < math.inf:
            raise ValueError(f"lasso and graph must be finite and at least 0, got {lasso} and {graph}")
        if not 0 < easy < math.inf or not 0 < gamma < math.inf:
            raise ValueError(f"easy and gamma must be finite and above 0, got {easy} and {gamma}")
        self.lasso, self.graph, self.easy, self.gamma = lasso, graph, easy, gamma

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``cross_entropy``, ``complexity`` and ``similarity``.

        Raises:
            ValueError: if the output has no saliencies with their features (another network, or not masked), or there is no reference yet.
        """
        names = [key.removeprefix("features/") for key in output.aux if key.startswith("features/")]
        if not names:
            raise ValueError("the output has no saliencies beside pooled features: ManifoldPruning is for ManiDP in masked execution")
        saliencies = [output.aux[f"saliency/{name}"] for name in names]
        cross_entropy = functional.cross_entropy(output.logits.float(), labels, reduction="none")
        weight = self.weight(cross_entropy)
        complexity = torch.stack([(weight * saliency.mean(1)).mean() for saliency in saliencies]).sum()
        pairs = zip(saliencies, (output.aux[f"features/{name}"] for name in names), strict=True)
        similarity = torch.stack([distance(saliency, features) for saliency, features in pairs]).sum()
        return {"cross_entropy": cross_entropy.mean(), "complexity": self.lasso * complexity, "similarity": self.graph * similarity}

    def weight(self, cross_entropy: Tensor) -> Tensor:
        """w_b in [0, 1] of images with that cross entropy, (B,), without a gradient."""
        if self.reference is None:
            raise ValueError("there is no reference cross entropy: add gatewatt.callbacks.SaliencyCalibration to the trainer, or set .reference")
        bound = self.easy * self.reference
        ease = 1 - cross_entropy.detach() / max(bound, 1e-12)
        return torch.where(cross_entropy.detach() < bound, ease.clamp_min(1e-10) ** self.gamma, 0.0)


def distance(saliency: Tensor, features: Tensor) -> Tensor:
    """Mean squared difference between the cosine similarities of (B, C) saliencies and those of (B, C') features; a scalar, float32 or better."""
    # Under autocast the products would be rounded to 8 bits, and the diagonal would not be 1.
    with torch.autocast(saliency.device.type, enabled=False):
        return (cosines(saliency) - cosines(features)).square().mean()


def cosines(rows: Tensor) -> Tensor:
    """Cosine similarity of every pair of rows, (B, C) -> (B, B); 0 with a row of zeros.

    Example:
        >>> cosines(torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]])).tolist()
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    rows = rows if rows.dtype == torch.float64 else rows.float()
    unit = functional.normalize(rows, dim=1, eps=1e-8)
    return unit @ unit.T
