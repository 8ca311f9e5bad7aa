"""Tasks: one LightningModule per job."""

from gatewatt.tasks.attack import EnergyAttackEvaluation
from gatewatt.tasks.defend import EnergyAdversarialTraining
from gatewatt.tasks.optimize import Optimization
from gatewatt.tasks.train import DynamicTraining

__all__ = ["DynamicTraining", "EnergyAdversarialTraining", "EnergyAttackEvaluation", "Optimization"]
