"""The cap holds for every pattern that a gate could ask for, and images below it run as they would."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.contracts.zoo import sample, settled, warmed
from tests.toys import Logistic
from torch import Tensor

from gatewatt.attacks import HingeLoss, L2Ball, ProjectedAttack
from gatewatt.defenses import BudgetGuard
from gatewatt.defenses.following import Reach
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork, DynamicOutput, Execution, Gate, forced, gate_table
from gatewatt.networks import ShallowDeep, SkipNet

EXECUTIONS: tuple[Execution, ...] = ("masked", "skipped")


@pytest.fixture(scope="module")
def skipnet() -> SkipNet:
    torch.manual_seed(2)
    network = warmed(SkipNet(14, width=4))
    assert isinstance(network, SkipNet)
    return network


def dictated(network: DynamicNetwork, share: float, images: Tensor) -> dict[str, Tensor]:
    """Random decisions with a share of open units, all open if it is 1."""
    with torch.no_grad():
        gates = network(images, "dense").gates
    generator = torch.Generator().manual_seed(4)
    return {name: (torch.rand(gate.score.shape, generator=generator) < share).float() for name, gate in gates.items() if gate.follows is None}


def by_hand(ledger: FlopsLedger, asked: list[int], cap: float, pace: float) -> list[int]:
    """What blocks of known prices run, first come, first served."""
    prices = [ledger.prices[charge.module] for charge in ledger.charges]
    spent, ran = ledger.fixed, []
    for index, (wanted, cost) in enumerate(zip(asked, prices, strict=True)):
        reserved = pace * (cap - ledger.fixed) * sum(prices[index + 1 :]) / sum(prices)
        ran.append(int(wanted and spent + cost <= cap - reserved + 1e-6))
        spent += ran[-1] * cost
    return ran


@pytest.mark.parametrize("pace", [0.0, 0.6, 1.0])
def test_blocks_open_as_long_as_the_budget_lasts(pace: float, skipnet: SkipNet) -> None:
    images = torch.rand(48, 3, 32, 32)
    ledger = price(skipnet, images[:1])
    for budget in (0.45, 0.6, 0.85, 1.0):
        guard = BudgetGuard(skipnet, budget, pace=pace)
        assert budget * ledger.dense - 1 < guard.certificate <= budget * ledger.dense
        for share in (1.0, 0.6):
            pattern = dictated(skipnet, share, images)
            asked = torch.cat(list(pattern.values()), dim=1).int().tolist()
            for execution in EXECUTIONS:
                with torch.no_grad(), forced(guard, pattern):
                    gates = guard(images, execution).gates
                assert gate_table(gates).executed.int().tolist() == [by_hand(ledger, row, guard.certificate, pace) for row in asked]
                assert ledger(gates).max() <= guard.certificate


def test_an_exit_is_forced_where_the_next_stage_is_not_affordable() -> None:
    torch.manual_seed(3)
    network = ShallowDeep("resnet-20", width=4).eval()
    images = sample()[:3]
    ledger = price(network, images[:1])
    reach = [ledger.fixed + sum(list(ledger.prices.values())[:count]) for count in range(len(ledger.prices) + 1)]
    for budget in (0.3, 0.5, 0.77, 0.99, 1.0):
        guard = BudgetGuard(network, budget)
        stages = sum(cost <= budget * ledger.dense for cost in reach) - 1
        for execution in EXECUTIONS:
            with torch.no_grad(), forced(guard, dictated(network, 1.0, images)):
                output = guard(images, execution)
            assert ledger(output.gates).tolist() == [reach[stages]] * 3
            assert output.exits is not None
            if stages < len(ledger.prices):
                assert torch.equal(output.logits, output.exits[:, stages])


def outputs(guard: BudgetGuard, images: Tensor, pattern: dict[str, Tensor] | None = None) -> tuple[DynamicOutput, DynamicOutput]:
    """Masked and skipped."""
    with torch.no_grad():
        if pattern is None:
            return guard(images, "masked"), guard(images, "skipped")
        with forced(guard, pattern):
            return guard(images, "masked"), guard(images, "skipped")


@pytest.mark.parametrize("family", ["sact", "act", "avit", "manidp", "dvt"])
def test_no_pattern_of_positions_tokens_or_channels_breaks_the_cap(family: str) -> None:
    network = settled(family)
    images = sample()[:4]
    ledger = price(network, images[:1])
    for rest in (0.15, 0.5):
        guard = BudgetGuard(network, (ledger.fixed + rest * (ledger.dense - ledger.fixed)) / ledger.dense)
        for share in (None, 1.0, 0.7, 0.3):
            masked, skipped = outputs(guard, images, None if share is None else dictated(network, share, images))
            assert torch.equal(gate_table(masked.gates).executed, gate_table(skipped.gates).executed)
            assert torch.allclose(masked.logits, skipped.logits, atol=1e-4)
            spent = ledger(skipped.gates)
            assert spent.max() <= guard.certificate
            if share == 1.0 and family != "dvt":
                # Not by running nothing at all; DVT's stages are too large for these budgets.
                assert spent.min() > ledger.fixed
        alone = [outputs(guard, image[None])[1] for image in images]
        together = outputs(guard, images)[1]
        assert torch.equal(torch.cat([gate_table(output.gates).executed for output in alone]), gate_table(together.gates).executed)


@pytest.mark.parametrize("pace", [0.0, 1.0])
def test_a_dilated_mask_is_booked_at_what_it_reaches(pace: float) -> None:
    network, images = settled("sact"), sample()[:4]
    ledger = price(network, images[:1])
    guard = BudgetGuard(network, (ledger.fixed + 0.6 * (ledger.dense - ledger.fixed)) / ledger.dense, pace=pace)
    spent = {}
    for reach in (1, None):
        # As learned, and booked as if a position reached everywhere.
        if reach is None:
            everywhere = {name: dict.fromkeys(followers, Reach(None)) for name, followers in guard.plan.followers.items()}
            guard.plan = replace(guard.plan, followers=everywhere)
        with torch.no_grad(), forced(guard, dictated(network, 1.0, images)):
            spent[reach] = ledger(guard(images, "skipped").gates)
        assert spent[reach].max() <= guard.certificate
    assert spent[1].min() > guard.certificate - 0.01 * ledger.dense
    assert spent[None].max() < guard.certificate - 0.02 * ledger.dense


def test_of_many_units_those_with_the_smallest_margin_close() -> None:
    network = settled("avit")
    images = sample()
    with torch.no_grad():
        free = network(images).gates
        dense = network(images, "dense").gates
    first = next(iter(free))
    ledger = price(network, images[:1])
    # Room for a part of what the first gate asks for.
    wanted = free[first].executed.sum(1).min().item()
    budget = ledger.fixed + ledger.per_gate(dense)[first][0].item() * 0.3 * wanted / dense[first].score.shape[1]
    with torch.no_grad():
        gates = BudgetGuard(network, budget / ledger.dense)(images).gates
    ran, wished, score = gates[first].executed.bool(), free[first].executed.bool(), gates[first].score
    assert bool((ran <= wished).all())
    for index in range(len(images)):
        dropped = score[index][wished[index] & ~ran[index]]
        assert len(dropped) > 0
        assert ran[index].any()
        assert score[index][ran[index]].min() >= dropped.max()


def test_an_image_below_the_cap_runs_as_without_a_guard(skipnet: SkipNet) -> None:
    with torch.no_grad():
        own = skipnet(sample())
        ledger = price(skipnet, sample()[:1])
        spent = ledger(own.gates)
        guard = BudgetGuard(skipnet, spent.max().item() / ledger.dense)
        guarded = guard(sample())
    assert torch.equal(own.logits, guarded.logits)
    assert torch.equal(gate_table(own.gates).executed, gate_table(guarded.gates).executed)


def test_an_attack_through_the_guard_stays_below_the_certificate() -> None:
    network, images = settled("skipnet"), sample()
    ledger = price(network, images[:1])
    with torch.no_grad():
        clean = ledger(network(images).gates)
    attack = ProjectedAttack(HingeLoss(), space=L2Ball(4.0), steps=10)
    guard = BudgetGuard(network, (ledger.dense - 1) / ledger.dense)
    for target, cap in ((network, ledger.dense), (guard, guard.certificate)):
        adversarial = attack(target, images).images
        with torch.no_grad():
            spent = ledger(target(adversarial, "skipped").gates)
        assert spent.max() > clean.min()
        assert spent.max() <= cap


def test_a_guard_leaves_no_trace_between_forwards(skipnet: SkipNet) -> None:
    guard = BudgetGuard(skipnet, 0.6)
    own = skipnet.decision
    with torch.no_grad():
        first, second = guard(sample()), guard(sample())
    assert torch.equal(gate_table(first.gates).executed, gate_table(second.gates).executed)
    assert skipnet.decision is own


class Disobedient(Logistic):
    """Asks nobody about its gates."""

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        output = super().forward(images, "dense")
        return output._replace(gates={name: Gate(gate.score, gate.threshold, gate.executed) for name, gate in output.gates.items()})


def test_what_cannot_be_guarded_says_so(skipnet: SkipNet, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"budget 0.01 is below the 0\.\d+ of the dense FLOPs that no gate can save"):
        BudgetGuard(skipnet, 0.01)
    for budget in (0.0, 1.2):
        with pytest.raises(ValueError, match=r"budget must be in \(0, 1\], a share of the dense FLOPs"):
            BudgetGuard(skipnet, budget)
    with pytest.raises(ValueError, match=r"pace must be in \[0, 1\], got 2"):
        BudgetGuard(skipnet, 0.7, pace=2)
    with pytest.raises(ValueError, match="size must be at least 1"):
        BudgetGuard(skipnet, 0.7, size=0)
    with pytest.raises(ValueError, match="priced for 32x32 images"):
        BudgetGuard(skipnet, 0.7)(images[:, :, :16])
    with pytest.raises(ValueError, match="Disobedient does not obey dictated decisions"):
        BudgetGuard(Disobedient(), 0.9, size=2)
