"""Tasks: one LightningModule per job."""

from gatewatt.tasks.attack import EnergyAttackEvaluation
from gatewatt.tasks.defend import AttackMix, EnergyAdversarialTraining
from gatewatt.tasks.optimize import Optimization
from gatewatt.tasks.static import StaticTraining
from gatewatt.tasks.train import DynamicTraining

__all__ = ["AttackMix", "DynamicTraining", "EnergyAdversarialTraining", "EnergyAttackEvaluation", "Optimization", "StaticTraining"]
