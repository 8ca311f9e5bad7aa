"""Gates, charges and decisions: the contract that every other floor builds on."""

from gatewatt.gating.decide import DECISIONS, Decision, Forced, decision_named, forced, hard, sampled, straight_through
from gatewatt.gating.gate import (
    EXECUTIONS,
    Charge,
    DynamicNetwork,
    DynamicOutput,
    Execution,
    Gate,
    GateTable,
    check_execution,
    gate_table,
    require_gates,
    split_output,
)
from gatewatt.gating.images import check_finite, check_images, check_labels

__all__ = [
    "DECISIONS",
    "EXECUTIONS",
    "Charge",
    "Decision",
    "DynamicNetwork",
    "DynamicOutput",
    "Execution",
    "Forced",
    "Gate",
    "GateTable",
    "check_execution",
    "check_finite",
    "check_images",
    "check_labels",
    "decision_named",
    "forced",
    "gate_table",
    "hard",
    "require_gates",
    "sampled",
    "split_output",
    "straight_through",
]
