"""Lightning callbacks: recovery during validation, FLOPs per gate, result files, training checkpoints."""

from gatewatt.callbacks.export import ExportCheckpoint
from gatewatt.callbacks.gates import GateReport
from gatewatt.callbacks.images import AdversarialPNGs
from gatewatt.callbacks.records import ResultFiles
from gatewatt.callbacks.recovery import RecoveryCallback
from gatewatt.callbacks.saving import AtomicCheckpointIO

__all__ = ["AdversarialPNGs", "AtomicCheckpointIO", "ExportCheckpoint", "GateReport", "RecoveryCallback", "ResultFiles"]
