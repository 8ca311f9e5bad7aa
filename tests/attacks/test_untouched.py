"""An attack leaves the network, the images and the random state as they were, wherever and however it ends."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatewatt.attacks import (
    ILFO,
    Attack,
    AutoEnergy,
    CheapestGateLoss,
    EnergyAttack,
    GradAuto,
    GradMDM,
    GradMDMReleased,
    L2Ball,
    LinfBall,
    Noise,
    ProjectedAttack,
    SquareSearch,
    under_attack,
)
from gatewatt.flops import price
from gatewatt.gating import decision_named, gate_table
from gatewatt.networks import SkipNet

CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture
def network() -> SkipNet:
    """A network in the middle of its training, with all that an attack could spoil: statistics, mixed modes, frozen parts, gradients."""
    torch.manual_seed(1)
    network = SkipNet(8, width=4, decision="sampled").train()
    network(torch.rand(8, 3, 32, 32)).logits.sum().backward()
    network.trunk.stem.eval()
    network.trunk.head.requires_grad_(False)
    network.gating.projection.bias.grad = None
    return network


def state(network: nn.Module) -> dict[str, Any]:
    """All that must stay, to the byte."""
    tensors = {**network.state_dict(), **dict(network.named_buffers())}
    return {
        "tensors": {name: (tensor.data_ptr(), tensor.numpy().tobytes()) for name, tensor in tensors.items()},
        "modules": {name: (id(module), module.training) for name, module in network.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in network.named_parameters()},
        "gradients": {name: None if p.grad is None else (p.grad.data_ptr(), p.grad.numpy().tobytes()) for name, p in network.named_parameters()},
        "decision": network.decision,
        "hooks": {name: (len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in network.named_modules()},
        "random": torch.get_rng_state().tolist(),
        "modes of torch": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
    }


ATTACKS = [
    GradMDM(steps=3),
    GradMDM(steps=3, keep="best", decision="straight_through"),
    EnergyAttack(steps=2, space=LinfBall(8 / 255)),
    GradMDM(steps=2, prediction_weight=1.0),
    GradMDMReleased(steps=3),
    ILFO(steps=2),
    GradAuto(steps=2),
    ProjectedAttack(steps=2, restarts=2, decision="straight_through"),
    ProjectedAttack(CheapestGateLoss(), space=L2Ball(0.5), steps=2),
    SquareSearch(steps=2),
    Noise("gaussian"),
    AutoEnergy(steps=1),
]
IDS = ["last", "best", "ball", "prediction", "released", "ilfo", "gradauto", "projected", "cheapest", "square", "noise", "auto"]


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_everything_is_as_it_was(context: str, attack: Attack, network: SkipNet, images: Tensor) -> None:
    kept, before = images.clone(), state(network)
    with CONTEXTS[context]():
        inside = state(network)
        attack(network, images, torch.zeros(7, dtype=torch.long))
        assert state(network) == inside
    assert state(network) == before
    assert torch.equal(images, kept)
    assert images.grad is None


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("attack", [GradMDM(steps=4, decision="straight_through"), AutoEnergy(steps=2)], ids=["gradmdm", "auto"])
def test_everything_is_as_it_was_after_an_error(attack: Attack, context: str, calls: int, network: SkipNet, images: Tensor) -> None:
    ledger, done = price(network, images[:1]), []

    def fail(module: nn.Module, inputs: Any, output: Tensor) -> None:
        done.append(1)
        if len(done) > calls:
            raise RuntimeError("boom")

    network.trunk.head.register_forward_hook(fail)
    before = state(network)
    with CONTEXTS[context](), pytest.raises(RuntimeError, match="boom"):
        attack(network, images, ledger=ledger)
    assert state(network) == before


@pytest.mark.parametrize("context", ["plain", "inference_mode"])
def test_everything_is_as_it_was_after_bad_input(context: str, network: SkipNet, images: Tensor) -> None:
    before = state(network)
    with CONTEXTS[context]():
        for bad in ({"images": 2 * images}, {"labels": torch.zeros(1, dtype=torch.long)}):
            with pytest.raises(ValueError, match="must"):
                GradMDM(steps=4)(**{"network": network, "images": images, **bad})
    assert state(network) == before


def test_everything_is_as_it_was_after_a_decision_that_does_not_exist(network: SkipNet) -> None:
    before = state(network)
    with pytest.raises(ValueError, match="decision must be one of"), under_attack(network, "soft"):
        pass
    assert state(network) == before


@pytest.mark.parametrize("context", ["no_grad", "inference_mode"])
def test_a_context_without_gradients_changes_nothing_of_the_attack(context: str, network: SkipNet, images: Tensor) -> None:
    expected = GradMDM(steps=4)(network, images)
    with CONTEXTS[context]():
        found = GradMDM(steps=4)(network, images.clone())
    assert torch.equal(found.images, expected.images)
    assert torch.equal(found.step, expected.step)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_images_made_in_inference_mode_can_be_trained_on(keep: Any, network: SkipNet, images: Tensor) -> None:
    with torch.inference_mode():
        adversarial = GradMDM(steps=2, keep=keep)(network, images.clone()).images
    assert not adversarial.is_inference()
    network(adversarial).logits.sum().backward()


def test_under_attack_the_network_is_the_deployed_one_and_frozen(network: SkipNet, images: Tensor) -> None:
    with torch.inference_mode(), under_attack(network):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


def test_under_attack_batchnorm_is_part_of_its_convolution_and_nothing_else_changes(network: SkipNet, images: Tensor) -> None:
    def scores_and_slope() -> tuple[Tensor, Tensor]:
        x = images.clone().requires_grad_()
        score = gate_table(network(x).gates).score
        return score, torch.autograd.grad(score.sum(), x)[0]

    watched: list[int] = []
    network.trunk.blocks[1].residual[1].register_forward_hook(lambda module, inputs, output: watched.append(len(output)))
    plain = copy.deepcopy(network).eval()
    plain.decision = decision_named("straight_through")
    with torch.enable_grad():
        x = images.clone().requires_grad_()
        expected = gate_table(plain(x).gates).score
        (slope,) = torch.autograd.grad(expected.sum(), x)
    watched.clear()
    with under_attack(network, "straight_through"):
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        found, found_slope = scores_and_slope()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found_slope, slope, rtol=1e-3, atol=1e-5 * slope.abs().max().item())
    # A layer that somebody watches stays.
    assert norms == [network.trunk.blocks[1].residual[1]]
    assert watched == [7]


def test_the_images_may_require_a_gradient_and_get_none(network: SkipNet, images: Tensor) -> None:
    images.requires_grad_()
    found = GradMDM(steps=2)(network, images).images
    assert images.grad is None
    assert not found.requires_grad


@pytest.mark.parametrize("attack", ATTACKS, ids=IDS)
def test_a_decision_of_the_networks_own_is_given_back(attack: Attack, images: Tensor) -> None:
    network, asked = SkipNet(8, width=4).eval(), []

    def own(name: str, score: Tensor, threshold: Tensor, *, training: bool) -> Tensor:
        asked.append(name)
        return (score >= threshold).to(score.dtype)

    network.decision = own
    attack(network, images, ledger=price(network, images[:1]))
    assert network.decision is own
    asked.clear()
    network(images)
    assert asked == ["block1", "block2"]
