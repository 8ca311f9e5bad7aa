"""PGD against the prediction: the published steps written a second time, where it stays, and what it needs."""

from __future__ import annotations

import pytest
import torch
from tests.toys import Logistic
from torch import Tensor
from torch.nn import functional

from gatewatt.attacks import AccuracyPGD, L2Ball, LinfBall
from gatewatt.attacks.base import image_noise

LABELS = torch.arange(12) % 4


@pytest.fixture
def small() -> Tensor:
    """Images of the toy network."""
    return torch.rand(12, 3, 2, 2, generator=torch.Generator().manual_seed(3))


def loss(network: Logistic, images: Tensor) -> Tensor:
    """Cross entropy of each image, written out."""
    with torch.no_grad():
        logits = network(images).logits
    return logits.exp().sum(1).log() - logits[torch.arange(len(logits)), LABELS]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steps_are_the_published_ones(norm: str, small: Tensor) -> None:
    network, eps, steps = Logistic().eval(), 0.1, 4
    space = LinfBall(eps) if norm == "linf" else L2Ball(eps)
    found = AccuracyPGD(space=space, steps=steps, seed=7)(network, small, LABELS).images
    at = small + space.within(image_noise(small, 7))
    for number in range(steps + 1):
        delta = at - small
        length = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        delta = delta.clamp(-eps, eps) if norm == "linf" else delta * (eps / length).clamp(max=1)
        at = (small + delta).clamp(0, 1).requires_grad_()
        if number == steps:
            break
        (slope,) = torch.autograd.grad(functional.cross_entropy(network(at).logits, LABELS, reduction="sum"), at)
        step = slope.sign() if norm == "linf" else slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        at = (at + 2.5 * eps / steps * step).detach()
    torch.testing.assert_close(found, at.detach())


@pytest.mark.parametrize("space", [LinfBall(0.05), L2Ball(0.3)], ids=["linf", "l2"])
def test_it_raises_the_cross_entropy_within_the_ball(space: LinfBall | L2Ball, small: Tensor) -> None:
    network = Logistic().eval()
    found = AccuracyPGD(space=space)(network, small, LABELS).images
    assert bool((loss(network, found) > loss(network, small)).all())
    assert found.min() >= 0
    assert found.max() <= 1
    assert bool(((found - small).flatten(1).norm(p=space.order, dim=1) <= space.eps + 1e-6).all())


def test_a_batch_gets_what_its_images_get_one_by_one(small: Tensor) -> None:
    network, attack = Logistic().eval(), AccuracyPGD(space=LinfBall(0.05), steps=3)
    before, network_before = small.clone(), {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(1)
    drawn = torch.rand(2)
    torch.manual_seed(1)
    together = attack(network, small, LABELS).images
    assert torch.equal(torch.rand(2), drawn)
    alone = torch.cat([attack(network, small[index : index + 1], LABELS[index : index + 1]).images for index in range(12)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(small, before)
    assert all(torch.equal(tensor, network_before[name]) for name, tensor in network.state_dict().items())


def test_a_trainer_hands_out_tensors_of_inference_mode(small: Tensor) -> None:
    network, attack = Logistic().eval(), AccuracyPGD(space=LinfBall(0.05), steps=3)
    expected = attack(network, small, LABELS).images
    with torch.inference_mode():
        assert torch.equal(attack(network, small.clone(), LABELS.clone()).images, expected)


def test_records_name_it_in_full() -> None:
    others = [{"space": L2Ball()}, {"steps": 9}, {"lr": 0.1}, {"random_start": False}, {"seed": 3}, {"decision": "hard"}, {"name": "other"}]
    found = [str(AccuracyPGD(**each).settings) for each in [{}, *others]]  # type: ignore[arg-type]
    assert len(set(found)) == len(found)


def test_what_it_cannot_do_is_said(small: Tensor) -> None:
    with pytest.raises(ValueError, match="AccuracyPGD ascends the cross entropy of the true classes: give labels"):
        AccuracyPGD()(Logistic().eval(), small)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        AccuracyPGD(steps=0)
    with pytest.raises(ValueError, match="lr must be finite and positive, got 0"):
        AccuracyPGD(lr=0)
