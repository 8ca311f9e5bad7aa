"""Gates, charges and decisions: the contract that every other floor builds on."""

from gatewatt.gating.decide import DECISIONS, Decision, Forced, decision_named, forced, hard, sampled, straight_through
from gatewatt.gating.exits import exit_score
from gatewatt.gating.gate import (
    EXECUTIONS,
    Charge,
    DynamicNetwork,
    DynamicOutput,
    Execution,
    Gate,
    GateTable,
    PartlyRun,
    check_execution,
    gate_table,
    measuring_execution,
    require_gates,
    split_output,
)
from gatewatt.gating.gate_hook import GateHook
from gatewatt.gating.halting import HaltingState, accumulate, advance, go_on_score, start_halting
from gatewatt.gating.hooks import HookedNetwork
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
    "GateHook",
    "GateTable",
    "HaltingState",
    "HookedNetwork",
    "PartlyRun",
    "accumulate",
    "advance",
    "check_execution",
    "check_finite",
    "check_images",
    "check_labels",
    "decision_named",
    "exit_score",
    "forced",
    "gate_table",
    "go_on_score",
    "hard",
    "measuring_execution",
    "require_gates",
    "sampled",
    "split_output",
    "start_halting",
    "straight_through",
]
