"""The loss of networks that halt: cross entropy plus a price on pondering."""

from __future__ import annotations

from torch import Tensor

from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicOutput
from gatewatt.objectives.base import CrossEntropy, Objective, Terms


class PonderCost(Objective):
    """Cross entropy plus ``weight`` times the ponder cost: the sum over blocks of the mean of N + R over images and positions.

    Graves 2016; per position in Figurnov et al., SACT (CVPR 2017), Sec. 3. Networks report it as ``aux["ponder"]``.

    Args:
        weight: tau of the papers, at least 0: 0.01 for SACT on CIFAR-10, 0.005 on ImageNet. Results are very sensitive to it.
        label_smoothing: of the cross entropy, in [0, 1); 0.1 for SACT on ImageNet.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, weight: float = 0.01, *, label_smoothing: float = 0.0) -> None:
        if weight < 0:
            raise ValueError(f"weight must be at least 0, got {weight}")
        self.weight = weight
        self.prediction = CrossEntropy(label_smoothing)

    def __call__(self, output: DynamicOutput, labels: Tensor, ledger: FlopsLedger) -> Terms:
        """Terms ``cross_entropy`` and ``ponder``.

        Raises:
            ValueError: if the network does not report a ponder cost.
        """
        if "ponder" not in output.aux:
            raise ValueError("the network reports no ponder cost, aux['ponder'] (B,); PonderCost is for networks that halt, such as SACT")
        return {**self.prediction(output, labels, ledger), "ponder": self.weight * output.aux["ponder"].mean()}
