"""Energy attacks: one loop; losses, directions and spaces plug in."""

from gatewatt.attacks.directions import ComplexityOnly, ConflictMasking, Direction, Joint, mask_conflict
from gatewatt.attacks.loop import AttackResult, EnergyAttack, under_attack
from gatewatt.attacks.losses import ComplexityLoss, FinishedLoss, GateLoss, PowerLoss
from gatewatt.attacks.spaces import LinfBall, ProjectionSpace, Space, TanhSpace
from gatewatt.attacks.zoo import ABLATIONS, GradMDM, ablation

__all__ = [
    "ABLATIONS",
    "AttackResult",
    "ComplexityLoss",
    "ComplexityOnly",
    "ConflictMasking",
    "Direction",
    "EnergyAttack",
    "FinishedLoss",
    "GateLoss",
    "GradMDM",
    "Joint",
    "LinfBall",
    "PowerLoss",
    "ProjectionSpace",
    "Space",
    "TanhSpace",
    "ablation",
    "mask_conflict",
    "under_attack",
]
