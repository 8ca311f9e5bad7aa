"""Gate usage and routes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import entropy

from gatewatt.metrics import GateUsage, route_statistics


@settings(deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 11)), elements=st.integers(0, 1)))
def test_statistics_equal_independent_formulas(executed):
    found = route_statistics(executed)
    routes, counts = np.unique(executed, axis=0, return_counts=True)
    assert found.routes == len(routes)
    assert found.entropy_bits == pytest.approx(entropy(counts, base=2), abs=1e-12)
    assert found.gate_variance == pytest.approx(executed.var(axis=0).mean(), abs=1e-12)
    assert found.static_percent == pytest.approx(100 * (executed == executed[0]).all(axis=0).mean())


def test_a_static_network_has_one_route_and_no_variance():
    found = route_statistics(torch.tensor([[1.0, 0.0, 1.0]]).expand(50, 3))
    assert found == (1, 0.0, 100.0, 0.0)


def test_rates_are_means_over_all_batches():
    executed = (torch.rand(21, 6, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    usage = GateUsage(units=6)
    for batch in executed.split(4):
        usage.update(batch)
    assert usage.compute().tolist() == executed.double().mean(dim=0).tolist()
    assert usage.compute().dtype == torch.float64


def test_anything_but_zeros_and_ones_is_refused():
    usage = GateUsage(units=2)
    for wrong in (torch.tensor([[0.5, 1.0]]), torch.tensor([[float("nan"), 1.0]])):
        with pytest.raises(ValueError, match="0 and 1 only"):
            usage.update(wrong)
        with pytest.raises(ValueError, match="0 and 1 only"):
            route_statistics(wrong)
    with pytest.raises(ValueError, match=r"shape \(B, 2\)"):
        usage.update(torch.zeros(1, 3))
    assert usage.images == 0
    with pytest.raises(ValueError, match="at least 1"):
        GateUsage(units=0)
