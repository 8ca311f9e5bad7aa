"""Losses of networks with several exits: a cross entropy at each, weighted by what is being trained.

Joint training and the training of internal classifiers alone are those of Kaya et al., "Shallow-Deep Networks" (ICML 2019); equal weights those
of Wang et al., "Dynamic Vision Transformers" (NeurIPS 2021). All read ``output.exits`` (B, E, K), the final classifier last, so they train
on masked or dense execution, in which every exit ran.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput
from gatewatt.objectives.base import Objective, Terms


class WeightedExits(Objective):
    """The final cross entropy, and those of the internal classifiers with weights that grow during the run (joint training of SDN).

    ``CE + sum_i tau_i CE_i`` with ``tau_i(e) = min(0.01 + e max_i / E, max_i)`` in epoch e = 1..E: at first the final classifier leads, in the
    end a classifier counts for about the share of the network's cost at which it stands.

    Args:
        maxima: max_i of each internal classifier in order; those that a network has no classifier for are left out, as the original does for
            a network of five.
        epochs: E, the number of equal steps in which the weights grow; the original's 100, one per epoch. They follow the progress of the
            run, whatever its real number of epochs.
        label_smoothing: in [0, 1), at every exit.

    Raises:
        ValueError: for a value out of range; in a call, if the network has no exits or more than there are maxima.

    Example:
        >>> [round(weight, 4) for weight in WeightedExits().weights(6)]
        [0.0115, 0.013, 0.0145, 0.016, 0.0175, 0.019]
    """

    def __init__(
        self,
        maxima: Sequence[float] = (0.15, 0.30, 0.45, 0.60, 0.75, 0.90),
        *,
        epochs: int = 100,
        label_smoothing: float = 0.0,
    ) -> None:
        if not maxima or not all(0 <= maximum < math.inf for maximum in maxima):
            raise ValueError(f"maxima must be finite and at least 0, one per internal classifier, got {tuple(maxima)}")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        self.maxima, self.epochs, self.label_smoothing = tuple(maxima), epochs, checked_smoothing(label_smoothing)

    def weights(self, count: int) -> list[float]:
        """tau_i of ``count`` internal classifiers at this point of the run."""
        if count > len(self.maxima):
            raise ValueError(f"the network has {count} internal classifiers and maxima only {len(self.maxima)} entries; give one for each")
        # Progress comes as a ratio of steps, which may fall short of a whole epoch by a rounding.
        epoch = math.floor(self.progress * self.epochs + 1e-9) + 1
        return [min(0.01 + epoch * maximum / self.epochs, maximum) for maximum in self.maxima[:count]]

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``cross_entropy`` of the final classifier and ``exit1``, ``exit2``, ... of the others."""
        exits = every_exit(output)
        return exit_terms(exits, labels, [*self.weights(exits.shape[1] - 1), 1.0], self.label_smoothing)


class InternalClassifiers(Objective):
    """The cross entropies of the internal classifiers alone, all with weight 1, for a network whose CNN is trained already and frozen.

    Args:
        label_smoothing: in [0, 1), at every exit.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = checked_smoothing(label_smoothing)

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``exit1``, ``exit2``, ...; the final classifier has none."""
        internal = every_exit(output)[:, :-1]
        return exit_terms(internal, labels, [1.0] * internal.shape[1], self.label_smoothing, final=False)


class SummedExits(Objective):
    """The cross entropies of all exits with weight 1, the final one included (DVT).

    Args:
        label_smoothing: in [0, 1), at every exit.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = checked_smoothing(label_smoothing)

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``exit1``, ``exit2``, ... and ``cross_entropy`` of the final classifier."""
        exits = every_exit(output)
        return exit_terms(exits, labels, [1.0] * exits.shape[1], self.label_smoothing)


def every_exit(output: DynamicOutput) -> Tensor:
    """Logits of all exits (B, E, K) in float32; at least two exits.

    Raises:
        ValueError: if the network has none.
    """
    if output.exits is None or output.exits.shape[1] < 2:
        raise ValueError("the network has no internal classifiers to train; use CrossEntropy or another objective without exits")
    return output.exits.float()


def exit_terms(exits: Tensor, labels: Tensor, weights: Sequence[float], label_smoothing: float, *, final: bool = True) -> Terms:
    """One weighted cross entropy per exit.

    Args:
        exits: logits (B, E, K).
        labels: (B,), or shares (B, K).
        weights: E numbers.
        label_smoothing: in [0, 1).
        final: whether the last exit is the final classifier, whose term is named ``cross_entropy``.
    """
    terms = {}
    for index, weight in enumerate(weights):
        name = "cross_entropy" if final and index == len(weights) - 1 else f"exit{index + 1}"
        terms[name] = weight * functional.cross_entropy(exits[:, index], labels, label_smoothing=label_smoothing)
    return terms


def checked_smoothing(label_smoothing: float) -> float:
    """``label_smoothing``, if it is in [0, 1).

    Raises:
        ValueError: if it is not.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    return label_smoothing
