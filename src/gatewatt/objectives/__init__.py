"""Training losses, one file per kind of dynamic decision."""

from gatewatt.objectives.base import CrossEntropy, Objective, Terms
from gatewatt.objectives.robust import EnergyAdversarialObjective
from gatewatt.objectives.skipping import ComputeTarget, HybridReinforcement

__all__ = ["ComputeTarget", "CrossEntropy", "EnergyAdversarialObjective", "HybridReinforcement", "Objective", "Terms"]
