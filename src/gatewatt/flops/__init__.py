"""FLOPs: prices from one dense trace, the ledger per image, and the proof. The only home of fvcore."""

from gatewatt.flops.audit import ExecutionMeter, Routes, audit, audit_dispatched, compare_routes, random_patterns
from gatewatt.flops.handles import UnpricedOperator
from gatewatt.flops.ledger import FlopsLedger
from gatewatt.flops.pricing import measuring, price
from gatewatt.flops.reach import within_reach

__all__ = [
    "ExecutionMeter",
    "FlopsLedger",
    "Routes",
    "UnpricedOperator",
    "audit",
    "audit_dispatched",
    "compare_routes",
    "measuring",
    "price",
    "random_patterns",
    "within_reach",
]
