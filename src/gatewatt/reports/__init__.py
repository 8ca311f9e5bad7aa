"""Tables and figures from result files alone: no network and no torch is needed to render them."""

from gatewatt.reports.collect import Panel, ReportError, Run, collect, find_runs, load_run, panels
from gatewatt.reports.matched import Matched, MatchedPoint, Ordering, match
from gatewatt.reports.render import report

__all__ = ["Matched", "MatchedPoint", "Ordering", "Panel", "ReportError", "Run", "collect", "find_runs", "load_run", "match", "panels", "report"]
