"""What holds for every test and every doctest."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

# A busy machine is no bug, so no deadline; and a test that fails today must fail again tomorrow, so no fresh examples.
settings.register_profile("gatewatt", deadline=None, derandomize=True)
settings.load_profile("gatewatt")


if torch.backends.cpu.get_cpu_capability() == "AVX2":
    # Without AVX-512, torch 2.14's backward pass of a channels_last convolution with four channels writes beyond its memory ("free(): invalid next
    # size"), and the smallest networks of the tests have such. Read when the first convolution runs, also by the processes that tests start.
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX")


def pytest_configure() -> None:
    # pytest-xdist runs one process per core: threads within a process would only wait for each other, and sums would depend on their number.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers for a test wherever and in whatever order it runs."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - what legacy callers draw from


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace: dict[str, Any]) -> None:
    """Names that examples in docstrings use without importing them."""
    doctest_namespace.update(torch=torch, np=np)
