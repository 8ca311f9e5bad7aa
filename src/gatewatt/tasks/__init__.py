"""Tasks: one LightningModule per job."""

from gatewatt.tasks.optimize import Optimization
from gatewatt.tasks.train import DynamicTraining

__all__ = ["DynamicTraining", "Optimization"]
