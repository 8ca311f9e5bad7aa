"""Lightning callbacks: recovery during validation, FLOPs per gate, result files."""

from gatewatt.callbacks.export import ExportCheckpoint
from gatewatt.callbacks.gates import GateReport
from gatewatt.callbacks.images import AdversarialPNGs
from gatewatt.callbacks.records import ResultFiles
from gatewatt.callbacks.recovery import RecoveryCallback

__all__ = ["AdversarialPNGs", "ExportCheckpoint", "GateReport", "RecoveryCallback", "ResultFiles"]
