"""Energy attacks: losses, directions and spaces plug into two loops; ensembles, searches and noise beside them."""

from gatewatt.attacks.accuracy import AccuracyPGD
from gatewatt.attacks.auto import AutoEnergy
from gatewatt.attacks.base import Attack, AttackResult, BestIterate, BrokenGradientError, NoGradientError, under_attack
from gatewatt.attacks.deepsloth import DeepSloth
from gatewatt.attacks.directions import ComplexityOnly, ConflictMasking, Direction, Joint, UnitLength, mask_conflict
from gatewatt.attacks.lattice import Lattice, LatticeBall
from gatewatt.attacks.layerwise import LayerwiseMasking
from gatewatt.attacks.loop import EnergyAttack
from gatewatt.attacks.losses import (
    CheapestGateLoss,
    ComplexityLoss,
    FinishedLoss,
    FinishedNormLoss,
    GateLoss,
    HingeLoss,
    NormLoss,
    OutputLoss,
    PowerLoss,
    UniformExitsLoss,
    UniformHaltingLoss,
)
from gatewatt.attacks.noise import Noise
from gatewatt.attacks.projected import ProjectedAttack
from gatewatt.attacks.saturation import unsaturated
from gatewatt.attacks.search import SquareSearch
from gatewatt.attacks.spaces import Ball, L2Ball, LinfBall, ProjectionSpace, Space, StandardizedTanhSpace, TanhSpace
from gatewatt.attacks.universal import UniversalAttack
from gatewatt.attacks.zoo import ABLATIONS, ILFO, GradAuto, GradMDM, GradMDMReleased, ablation

__all__ = [
    "ABLATIONS",
    "ILFO",
    "AccuracyPGD",
    "Attack",
    "AttackResult",
    "AutoEnergy",
    "Ball",
    "BestIterate",
    "BrokenGradientError",
    "CheapestGateLoss",
    "ComplexityLoss",
    "ComplexityOnly",
    "ConflictMasking",
    "DeepSloth",
    "Direction",
    "EnergyAttack",
    "FinishedLoss",
    "FinishedNormLoss",
    "GateLoss",
    "GradAuto",
    "GradMDM",
    "GradMDMReleased",
    "HingeLoss",
    "Joint",
    "L2Ball",
    "Lattice",
    "LatticeBall",
    "LayerwiseMasking",
    "LinfBall",
    "NoGradientError",
    "Noise",
    "NormLoss",
    "OutputLoss",
    "PowerLoss",
    "ProjectedAttack",
    "ProjectionSpace",
    "Space",
    "SquareSearch",
    "StandardizedTanhSpace",
    "TanhSpace",
    "UniformExitsLoss",
    "UniformHaltingLoss",
    "UnitLength",
    "UniversalAttack",
    "ablation",
    "mask_conflict",
    "under_attack",
    "unsaturated",
]
