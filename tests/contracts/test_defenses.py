"""Every network behind every defense is the network it was: same type, same prices, attacked without a word about the defense."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.zoo import FAMILIES, sample, settled
from torch import Tensor

from gatewatt.attacks import ComplexityOnly, EnergyAttack, HingeLoss, LinfBall
from gatewatt.defenses import JPEG, BitDepth, BudgetGuard, Defended, MedianFilter, ReservingGuard, Wrapper
from gatewatt.defenses.nesting import lies_within
from gatewatt.flops import compare_routes, price
from gatewatt.gating import DynamicNetwork, check_finite, forced, gate_table, split_output

pytestmark = pytest.mark.timeout(300)


def defended(network: DynamicNetwork) -> list[Wrapper]:
    """The network behind each defense."""
    last = list(lies_within(network, 32))[-1]
    guards = [BudgetGuard(network, 0.9), ReservingGuard(network, 0.9, [last])]
    return [Defended(network, JPEG(90)), Defended(network, MedianFilter()), Defended(network, BitDepth(3)), *guards]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_defended_network_keeps_the_contract(family: str) -> None:
    network = settled(family)
    own, images = price(network, sample()[:1]), sample()
    for target in defended(network):
        ledger = price(target, images[:1])
        assert (ledger.dense, ledger.fixed, ledger.overhead, ledger.units) == (own.dense, own.fixed, own.overhead, own.units)
        assert list(ledger.prices.values()) == list(own.prices.values())
        with torch.no_grad():
            dense, masked, skipped = (target(images, execution) for execution in ("dense", "masked", "skipped"))
            pattern = {name: torch.zeros_like(gate.score) for name, gate in dense.gates.items() if gate.follows is None}
            with forced(target, pattern):
                closed = ledger(target(images, "skipped").gates)
        assert closed.tolist() == [own.fixed] * len(images)
        for output in (dense, masked, skipped):
            check_finite(output)
            assert list(output.gates) == list(own.units)
        assert torch.equal(gate_table(masked.gates).executed, gate_table(skipped.gates).executed)
        assert torch.allclose(masked.logits, skipped.logits, atol=1e-4)
        routes = compare_routes(target, images[[3, 9]], ledger)
        assert routes.agree, (target.settings, routes)
        parts = split_output(skipped, [1] * len(images))
        for index in (0, 7):
            with torch.no_grad():
                alone = target(images[index : index + 1], "skipped")
            assert torch.allclose(alone.logits, parts[index].logits, rtol=1e-4, atol=1e-5)
            assert torch.equal(gate_table(alone.gates).executed, gate_table(parts[index].gates).executed)


def reached(target: DynamicNetwork, images: Tensor) -> Tensor:
    """How far the scores have come on the way to their thresholds, a mean over images and gates."""
    with torch.no_grad():
        table = gate_table(target(images).gates)
    return torch.minimum(table.score, table.threshold).mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_attacks_pass_through_every_defense(family: str) -> None:
    network, images = settled(family), sample()[6:]
    attack = EnergyAttack(HingeLoss(), ComplexityOnly(), space=LinfBall(16 / 255), gamma=0.0, steps=6, warmup=0.0, lr=0.02)
    for target in defended(network):
        pixels = images.clone().requires_grad_()
        for name, gate in target(pixels).gates.items():
            if gate.follows is None:
                (gradient,) = torch.autograd.grad(gate.score.sum(), pixels, retain_graph=True)
                assert bool(torch.isfinite(gradient).all()), (target.settings, name)
                assert bool((gradient != 0).any()), (target.settings, name)
        adversarial = attack(target, images).images
        assert reached(target, adversarial) > reached(target, images), target.settings
        if isinstance(target, BudgetGuard):
            with torch.no_grad():
                spent = target.plan.ledger(target(adversarial, "skipped").gates)
            assert spent.max() <= target.certificate
