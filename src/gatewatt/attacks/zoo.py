"""Published attacks by name.

GradMDM and its ablations (Pan et al., TPAMI 2023, Tables 4 and 9). The ablations differ from GradMDM in loss and direction alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from gatewatt.attacks.directions import ComplexityOnly, ConflictMasking, Direction, Joint
from gatewatt.attacks.loop import EnergyAttack
from gatewatt.attacks.losses import ComplexityLoss, GateLoss, PowerLoss
from gatewatt.attacks.spaces import Space


class GradMDM(EnergyAttack):
    """Power loss and complexity gradient masking, as the paper states them: input level, per image.

    Where the paper leaves a choice open, the default is the reading explained at :class:`~gatewatt.attacks.EnergyAttack`.

    Args:
        alpha: power of Eq. 7, at least 1 (4 in the paper; 1 without masking is Eq. 6).
        gamma: weight of the squared error.
        steps: iterations.
        warmup: fraction of the steps on Eq. 6 alone.
        lr: Adam's learning rate.
        space: where the perturbation lives.
        keep: ``last`` (the paper) or ``best`` iterate by true FLOPs.
        decision: attack through this decision instead of the network's own.
    """

    def __init__(
        self,
        alpha: float = 4.0,
        *,
        gamma: float = 100.0,
        steps: int = 100,
        warmup: float = 0.2,
        lr: float = 0.01,
        space: Space | None = None,
        keep: Literal["last", "best"] = "last",
        decision: Literal["straight_through", "hard"] | None = None,
    ) -> None:
        super().__init__(
            PowerLoss(alpha),
            ConflictMasking(),
            space=space,
            gamma=gamma,
            steps=steps,
            warmup=warmup,
            lr=lr,
            keep=keep,
            decision=decision,
        )


ABLATIONS: dict[str, tuple[Callable[[], GateLoss], Callable[[], Direction]]] = {
    "Eq5": (ComplexityLoss, Joint),
    "Eq6": (ComplexityLoss, ComplexityOnly),
    "CGM": (ComplexityLoss, ConflictMasking),
    "Power": (PowerLoss, ComplexityOnly),
    "PowerJoint": (PowerLoss, Joint),
}
"""Name -> loss and direction: Eq. 5, Eq. 6, masking alone, power alone, and ``L_P + L_F``."""


def ablation(name: str, *, gamma: float = 100.0, steps: int = 100, keep: Literal["last", "best"] = "last") -> EnergyAttack:
    """An ablation of GradMDM by name, everything else as in GradMDM.

    Args:
        name: one of :data:`ABLATIONS`.
        gamma: weight of the squared error.
        steps: iterations.
        keep: ``last`` or ``best`` iterate.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in ABLATIONS:
        raise ValueError(f"ablation must be one of {', '.join(ABLATIONS)}, got {name!r}")
    loss, direction = ABLATIONS[name]
    return EnergyAttack(loss(), direction(), gamma=gamma, steps=steps, keep=keep, name=name)
