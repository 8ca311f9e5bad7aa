"""Training losses, one file per kind of dynamic decision."""

from gatewatt.objectives.base import CrossEntropy, Objective, Terms
from gatewatt.objectives.skipping import ComputeTarget, HybridReinforcement

__all__ = ["ComputeTarget", "CrossEntropy", "HybridReinforcement", "Objective", "Terms"]
