"""Interleaved timing: ratios inside one run, because absolute times on shared machines mean little."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved(cases: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Run the cases in turn, A B C A B C ..., and return the median seconds of each; arguments as for :func:`seconds_of_rounds`."""
    return {name: statistics.median(times) for name, times in seconds_of_rounds(cases, rounds=rounds, warmup=warmup).items()}


def seconds_of_rounds(cases: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Run the cases in turn, A B C A B C ..., and return the seconds of each, round by round.

    Args:
        cases: name -> what to time.
        rounds: counted rounds.
        warmup: rounds not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, case in cases.items():
            start = time.perf_counter()
            case()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def describe_machine() -> str:
    """Processor, threads and versions, for the first line of a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
