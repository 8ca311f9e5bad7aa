"""The contract: gates side by side, ties, and what is refused."""

from __future__ import annotations

import pytest
import torch

from gatewatt.gating import EXECUTIONS, DynamicOutput, Gate, check_execution, gate_table, require_gates, split_output


def gate(units: int, threshold: torch.Tensor, seed: int) -> Gate:
    score = torch.rand(3, units, generator=torch.Generator().manual_seed(seed))
    return Gate(score, threshold, (score >= threshold).float())


def test_a_table_lays_gates_side_by_side_in_execution_order() -> None:
    late, early = gate(2, torch.tensor(0.5), 1), gate(3, torch.tensor([0.1, 0.2, 0.3]), 2)
    table = gate_table({"z_runs_first": late, "a_runs_second": early})
    assert [part.shape for part in table] == [(3, 5)] * 3
    assert torch.equal(table.score, torch.hstack([late.score, early.score]))
    assert torch.equal(table.executed, torch.hstack([late.executed, early.executed]))
    assert torch.allclose(table.threshold, torch.tensor([[0.5, 0.5, 0.1, 0.2, 0.3]]).expand(3, 5))


def test_a_table_keeps_the_gradient_of_every_score() -> None:
    scores = [torch.rand(2, units, requires_grad=True) for units in (1, 4)]
    gates = {str(index): Gate(score, torch.tensor(0.5), torch.ones_like(score)) for index, score in enumerate(scores)}
    weights = torch.arange(10.0).view(2, 5)
    gradients = torch.autograd.grad((weights * gate_table(gates).score).sum(), scores)
    assert [gradient.tolist() for gradient in gradients] == [weights[:, :1].tolist(), weights[:, 1:].tolist()]


def test_a_gate_that_follows_another_is_split_but_not_listed() -> None:
    own = gate(4, torch.tensor(0.5), 1)
    follower = Gate(own.score, own.threshold, torch.ones_like(own.executed), follows="own")
    gates = {"own": own, "follower": follower}
    assert gate_table(gates).score.shape == (3, 4)
    first, rest = split_output(DynamicOutput(torch.zeros(3, 2), gates), [1, 2])
    assert first.gates["follower"].follows == "own"
    assert first.gates["follower"].executed.shape == (1, 4)
    assert torch.equal(rest.gates["own"].score, own.score[1:])


def test_a_score_on_the_threshold_spends() -> None:
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    on_and_below = Gate(torch.stack([torch.tensor(0.5), below])[None], torch.tensor(0.5), torch.tensor([[1.0, 0.0]]))
    assert on_and_below.open.tolist() == [[True, False]]


def test_a_network_without_gates_is_refused() -> None:
    with pytest.raises(ValueError, match="returned no gates"):
        require_gates({})
    with pytest.raises(ValueError, match="returned no gates"):
        gate_table({})


def test_an_unknown_execution_is_named() -> None:
    for execution in EXECUTIONS:
        check_execution(execution)
    with pytest.raises(ValueError, match="one of masked, dense, skipped, got 'sparse'"):
        check_execution("sparse")
