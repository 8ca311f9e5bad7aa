"""Training losses, one file per kind of dynamic decision."""

from gatewatt.objectives.base import CrossEntropy, Objective, Terms
from gatewatt.objectives.exits import InternalClassifiers, SummedExits, WeightedExits
from gatewatt.objectives.halting_prior import HaltingPrior
from gatewatt.objectives.manifold import ManifoldPruning
from gatewatt.objectives.ponder import PonderCost
from gatewatt.objectives.robust import EnergyAdversarialObjective
from gatewatt.objectives.skipping import ComputeTarget, HybridReinforcement

__all__ = [
    "ComputeTarget",
    "CrossEntropy",
    "EnergyAdversarialObjective",
    "HaltingPrior",
    "HybridReinforcement",
    "InternalClassifiers",
    "ManifoldPruning",
    "Objective",
    "PonderCost",
    "SummedExits",
    "Terms",
    "WeightedExits",
]
