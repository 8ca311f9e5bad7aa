"""GradMDM as released: its losses, its map, and its masking inside the backward pass, each against a second implementation in float64."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.contracts.zoo import FAMILIES, sample, warmed
from tests.toys import LEDGER, Logistic
from torch import Tensor

from gatewatt.attacks import (
    EnergyAttack,
    FinishedNormLoss,
    GateLoss,
    GradMDM,
    GradMDMReleased,
    LayerwiseMasking,
    NormLoss,
    PowerLoss,
    ProjectedAttack,
    StandardizedTanhSpace,
    UnitLength,
)
from gatewatt.flops import price
from gatewatt.gating import DynamicNetwork, GateTable, gate_table
from gatewatt.networks import SkipNet
from gatewatt.networks.layers import CIFAR_MEAN, CIFAR_STD

MEAN, STD = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CIFAR_MEAN, CIFAR_STD))


def skipnet(**arguments: Any) -> SkipNet:
    """Five gates, open and closed by turns."""
    torch.manual_seed(2)
    network = SkipNet(14, width=4, **arguments)
    warmed(network)
    with torch.no_grad():
        if hasattr(network.gating, "projection"):
            network.gating.projection.weight.mul_(20)
            logits = gate_table(network(sample()).gates).score.logit()
            # Not on the median: there a score is on its threshold to the last bit.
            network.gating.projection.bias.sub_(logits.median() + 0.01)
    return network.eval()


# ---- losses ----


@pytest.fixture
def table() -> GateTable:
    score = torch.rand(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return GateTable(score, torch.full_like(score, 0.5), (score >= 0.5).double())


@pytest.mark.parametrize("p", [1.0, 3.5, 6.0])
def test_the_norm_of_closed_gates(p: float, table: GateTable) -> None:
    score = table.score.numpy()
    expected = [-(sum(min(value, 0.5) ** p for value in row) ** (1 / p)) for row in score]
    np.testing.assert_allclose(NormLoss(p)(table, torch.ones(6)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("p", [0.35, 1.0, 50.0])
def test_the_norm_of_what_open_gates_lack(p: float, table: GateTable) -> None:
    expected = [sum((1 - max(value, 0.5)) ** p for value in row) ** (1 / p) for row in table.score.numpy()]
    np.testing.assert_allclose(FinishedNormLoss(p)(table, torch.ones(6)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("loss", [NormLoss(), FinishedNormLoss(0.35), FinishedNormLoss(50.0)], ids=["closed", "sp", "hrl"])
def test_their_gradients_are_finite_differences(loss: GateLoss, table: GateTable) -> None:
    weights = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    score = table.score.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(table._replace(score=score), weights).sum(), score)
    for unit in range(6):
        nudge = torch.zeros(6, dtype=torch.float64)
        nudge[unit] = 1e-7
        slope = (loss(table._replace(score=table.score + nudge), weights) - loss(table._replace(score=table.score - nudge), weights)) / 2e-7
        torch.testing.assert_close(gradient[:, unit], slope, rtol=1e-5, atol=1e-6)


def test_the_norm_points_where_the_power_loss_points(table: GateTable) -> None:
    def direction(loss: GateLoss) -> Tensor:
        score = table.score.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(table._replace(score=score), torch.ones(6)).sum(), score)
        return gradient / gradient.norm(dim=1, keepdim=True).clamp_min(1e-300)  # where all gates are open there is none

    torch.testing.assert_close(direction(NormLoss(3.5)), direction(PowerLoss(3.5)))


@pytest.mark.parametrize("loss", [NormLoss(), FinishedNormLoss(0.35), FinishedNormLoss(50.0)], ids=["closed", "sp", "hrl"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_saturated_gates_have_finite_gradients(loss: GateLoss, value: float) -> None:
    score = torch.full((2, 3), value, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(GateTable(score, torch.full((2, 3), 0.5), score.detach()), torch.ones(3)).sum(), score)
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize(("kind", "p"), [(NormLoss, 0.5), (NormLoss, math.inf), (FinishedNormLoss, 0.0), (FinishedNormLoss, math.nan)])
def test_a_p_out_of_range_is_refused(kind: type[GateLoss], p: float) -> None:
    with pytest.raises(ValueError, match="p must be finite and"):
        kind(p)  # type: ignore[call-arg]


# ---- the map ----


def test_the_map_is_the_releases_on_cifar_10() -> None:
    images, delta = torch.rand(4, 3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    low, high = (torch.tensor(end, dtype=torch.float64).view(3, 1, 1) for end in ([-2.4291, -2.4183, -2.2214], [2.5141, 2.5968, 2.7537]))
    standardised = low + (high - low) * (torch.tanh(0.8 * ((images - MEAN) / STD + delta)) + 1) / 2
    space = StandardizedTanhSpace()
    found = space.image(space.encode(images), delta)
    torch.testing.assert_close(found, MEAN + STD * standardised, rtol=0, atol=1e-4)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    delta.requires_grad_()
    perturbed, outer = space.image(space.encode(images), delta), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    (expected,) = torch.autograd.grad((outer * perturbed).sum(), delta)
    torch.testing.assert_close(space.pullback(perturbed.detach(), outer), expected, rtol=1e-12, atol=1e-12)
    assert (space.image(space.encode(images), 0 * delta) - images).abs().mean() > 0.02
    with pytest.raises(ValueError, match="mean and std must have three entries and std be positive"):
        StandardizedTanhSpace(std=(1.0, 0.0, 1.0))


# ---- masking inside the backward pass ----


class Meeting(torch.autograd.Function):
    """Two readers of one tensor, and what their gradients become where they meet."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, notes: dict[str, Any], index: int) -> tuple[Tensor, Tensor]:
        ctx.notes, ctx.index = notes, index
        return features.clone(), features.clone()

    @staticmethod
    def backward(ctx: Any, of_block: Tensor, of_gate: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        notes, index, rows = ctx.notes, ctx.index, []
        for image in range(len(of_block)):
            masks = notes["masks"][image, index:]
            count = (1 - masks).sum() if notes["pass"] == 0 else masks.sum()
            block, gate = (part[image] / (part[image].square().sum().sqrt() + 1e-20) for part in (of_block, of_gate))
            rows.append(count * block + gate)
        mixed = torch.stack(rows)
        if notes["pass"] == 0:
            notes["first"][index] = mixed
        else:
            for image, before in enumerate(notes["first"][index]):
                unit = before / (before.square().sum().sqrt() + 1e-20)
                mixed[image] -= min(float((mixed[image] * unit).sum()), 0.0) * unit
        return mixed, None, None


def released_scores(network: SkipNet, images: Tensor, notes: dict[str, Any]) -> Tensor:
    """The forward pass of the release: a closed block's shortcut leaves from before the meeting, except at the first."""
    first, *others = network.blocks
    features = first(network.trunk.stem(network.trunk.normalize(images)))
    features, branch = Meeting.apply(features, notes, 0)
    previous, state, scores, masks = features, None, [], []
    for index, block in enumerate(others):
        score, state = network.gating(branch, index, state)
        score = score.float()  # as the network's own
        mask = (score > 0.5).to(score).detach()
        if network.arguments["decision"] == "straight_through":
            mask = mask - score.detach() + score
        scores.append(score)
        masks.append(mask.detach())
        opened = torch.relu(block.residual(features) + block.shortcut(features))
        weight = mask.to(features)[:, :, None, None]
        features = previous = weight * opened + (1 - weight) * block.shortcut(previous)
        if index + 1 < len(others):
            features, branch = Meeting.apply(features, notes, index + 1)
    notes["masks"] = torch.cat(masks, 1)
    return torch.cat(scores, 1)


def released_gradient(network: SkipNet, images: Tensor, finished: float) -> Tensor:
    notes: dict[str, Any] = {"first": {}, "pass": 0}
    images = images.clone().requires_grad_()
    scores = released_scores(network, images, notes)
    open_loss = (1 - scores.clamp(min=0.5)).norm(p=finished, dim=1).sum()
    closed_loss = -scores.clamp(max=0.5).norm(p=3.5, dim=1).sum()
    torch.autograd.grad(open_loss, images, retain_graph=True)
    notes["pass"] = 1
    return torch.autograd.grad(closed_loss, images)[0]


def our_gradient(network: DynamicNetwork, images: Tensor, direction: LayerwiseMasking) -> Tensor:
    images = images.clone().requires_grad_()
    with direction.attached(network) as attached:
        table = gate_table(network(images).gates)
        weights = torch.ones_like(table.score[0])
        return attached(NormLoss(3.5), table, weights, lambda loss, more: torch.autograd.grad(loss.sum(), images, retain_graph=more)[0])


# Not 50: its slopes underflow in the float32 of the scores, and what is then scaled to length 1 is rounding.
@pytest.mark.parametrize("finished", [0.35, 5.0])
@pytest.mark.parametrize(
    "arguments", [{}, {"decision": "hard"}, {"decision": "sampled"}, {"gate": "feedforward1"}], ids=["sp", "hard", "hrl", "feedforward"]
)
def test_the_masked_gradient_is_that_of_a_second_implementation(arguments: dict[str, Any], finished: float) -> None:
    network, images = skipnet(**arguments).double(), sample().double()
    found, expected = our_gradient(network, images, LayerwiseMasking(finished)), released_gradient(network, images, finished)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected.abs().max()))
    # One by one: counts, lengths and conflicts are an image's own.
    for index in (0, 5):
        torch.testing.assert_close(
            our_gradient(network, images[index : index + 1], LayerwiseMasking(finished))[0], found[index], rtol=1e-6, atol=1e-9
        )


def test_masking_changes_the_gradient_and_leaves_the_network_alone() -> None:
    network, images = skipnet().double(), sample().double()
    masked = our_gradient(network, images, LayerwiseMasking())
    assert not network._forward_pre_hooks
    assert not network.gating._forward_pre_hooks
    plain = images.clone().requires_grad_()
    table = gate_table(network(plain).gates)
    (gradient,) = torch.autograd.grad(NormLoss(3.5)(table, torch.ones(5)).sum(), plain)
    assert bool((torch.cosine_similarity(masked.flatten(1), gradient.flatten(1), dim=1) < 0.999).any())


def by_hand(network: SkipNet, images: Tensor, *, gamma: float, steps: int, warm: int, lr: float, finished: float) -> Tensor:
    """The whole release in float64, with torch's Adam, the penalty by autograd, and 3HW in place of 1.5e5."""
    network = copy.deepcopy(network).double()
    standardised = (images.double() - MEAN) / STD
    delta = torch.zeros_like(standardised, requires_grad=True)
    low, high = -MEAN / STD, (1 - MEAN) / STD
    adam = torch.optim.Adam([delta], lr)

    def mapped() -> Tensor:
        return low + (high - low) * (torch.tanh(0.8 * (standardised + delta)) + 1) / 2

    for step in range(steps):
        image = mapped()
        pixels = (MEAN + STD * image).detach()
        if step < warm:
            pixels.requires_grad_()
            of_gates = torch.autograd.grad(-gate_table(network(pixels).gates).score.clamp(max=0.5).sum(), pixels)[0]
        else:
            of_gates = released_gradient(network, pixels, finished)
        total = (images[0].numel() * (of_gates * STD) * image).sum() + gamma * (image - standardised).square().sum()
        (delta.grad,) = torch.autograd.grad(total, delta)
        adam.step()
    return (MEAN + STD * mapped()).detach()


def test_the_whole_attack_is_that_of_a_second_implementation() -> None:
    network, images = skipnet(), sample()
    found = GradMDMReleased(gamma=20.0, steps=10)(network, images).images
    expected = by_hand(network, images, gamma=20.0, steps=10, warm=1, lr=0.01, finished=0.35)
    # Adam's steps are nearly signs: where a gradient is next to nothing, float32 and float64 may go different ways.
    error = (found.double() - expected).abs()
    assert error.median() < 1e-5
    assert (error > 1e-3).double().mean() < 0.02
    assert (found - GradMDM(gamma=20.0, steps=10)(network, images).images).abs().mean() > 0.01


def test_it_is_what_it_says() -> None:
    settings = GradMDMReleased().settings
    assert (settings["name"], settings["gamma"], settings["steps"], settings["warmup"], settings["lr"]) == ("GradMDMReleased", 100.0, 100, 0.1, 0.01)
    assert (settings["weighing"], settings["keep"], settings["reduction"]) == ("equal", "last", "mean")
    assert settings["loss"] == {"kind": "NormLoss", "p": 3.5}
    assert settings["direction"] == {"kind": "LayerwiseMasking", "finished": {"kind": "FinishedNormLoss", "p": 0.35}}


def test_equal_weighing_leaves_the_prices_out() -> None:
    images = torch.rand(6, 3, 2, 2)
    dear = LEDGER
    cheap = type(dear)(**{**vars(dear), "prices": {"a": 1.0, "b": 1000.0}, "dense": 1049.0})

    def found(weighing: Any, ledger: Any) -> Tensor:
        return EnergyAttack(gamma=0.1, steps=5, lr=0.05, weighing=weighing)(Logistic().eval(), images, ledger=ledger).images

    assert torch.equal(found("equal", dear), found("equal", cheap))
    assert not torch.equal(found("flops", dear), found("flops", cheap))
    with pytest.raises(ValueError, match="weighing must be flops or equal, got 'cost'"):
        EnergyAttack(weighing="cost")  # type: ignore[arg-type]


def test_recovery_rises_and_images_are_valid() -> None:
    network, images = skipnet(), sample()
    ledger = price(network, images[:1])
    found = GradMDMReleased(gamma=0.01, steps=30)(network, images, ledger=ledger).images
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    with torch.no_grad():
        assert ledger(network(found).gates).sum() > ledger(network(images).gates).sum()


@pytest.mark.parametrize("family", ["sact", "manidp", "shallow-deep", "avit"])
def test_other_networks_are_refused_in_one_line(family: str) -> None:
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="needs one gate module for each block that is skipped; this network calls"):
        GradMDMReleased(steps=3)(FAMILIES[family]().eval(), sample()[:2])


def test_it_belongs_to_its_loop() -> None:
    with pytest.raises(ValueError, match="works inside the backward passes of EnergyAttack; other attacks take ConflictMasking"):
        ProjectedAttack(PowerLoss(), LayerwiseMasking(), steps=1)(Logistic().eval(), torch.rand(2, 3, 2, 2), ledger=LEDGER)


def test_its_length_can_be_scaled() -> None:
    network, images = skipnet().double(), sample().double()
    with UnitLength(LayerwiseMasking()).attached(network) as direction:
        leaf = images.clone().requires_grad_()
        table = gate_table(network(leaf).gates)
        found = direction(NormLoss(), table, torch.ones(5), lambda loss, more: torch.autograd.grad(loss.sum(), leaf, retain_graph=more)[0])
    plain = our_gradient(network, images, LayerwiseMasking())
    torch.testing.assert_close(found, plain / plain.flatten(1).norm(dim=1).view(-1, 1, 1, 1))
