"""Lightning callbacks: averaged weights, calibrated thresholds, recovery during validation, FLOPs per gate, result files, training checkpoints."""

from gatewatt.callbacks.averaging import WeightAverage
from gatewatt.callbacks.budget import ExitBudget
from gatewatt.callbacks.export import ExportCheckpoint
from gatewatt.callbacks.gates import GateReport
from gatewatt.callbacks.halting_center import HaltingCenter
from gatewatt.callbacks.images import AdversarialPNGs
from gatewatt.callbacks.records import ResultFiles
from gatewatt.callbacks.recovery import RecoveryCallback
from gatewatt.callbacks.saliency import SaliencyCalibration
from gatewatt.callbacks.saving import AtomicCheckpointIO

__all__ = [
    "AdversarialPNGs",
    "AtomicCheckpointIO",
    "ExitBudget",
    "ExportCheckpoint",
    "GateReport",
    "HaltingCenter",
    "RecoveryCallback",
    "ResultFiles",
    "SaliencyCalibration",
    "WeightAverage",
]
