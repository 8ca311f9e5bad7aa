"""The projected descent: against the algorithm written a second time, in what it keeps, where it stays and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.toys import LEDGER, Detached, Logistic, Rooted, Saturated
from torch import Tensor

from gatewatt.attacks import (
    Ball,
    CheapestGateLoss,
    ConflictMasking,
    GradAuto,
    GradMDM,
    HingeLoss,
    L2Ball,
    LinfBall,
    NoGradientError,
    PowerLoss,
    ProjectedAttack,
    SquareSearch,
    UniformExitsLoss,
)
from gatewatt.attacks.projected import step_checkpoints
from gatewatt.flops import price
from gatewatt.gating import DynamicNetwork
from gatewatt.networks import SkipNet

Array = NDArray[np.float64]
BALLS: list[Ball] = [LinfBall(0.08), L2Ball(0.3)]
ENDLESS = replace(LEDGER, dense=1e9)
"""The same prices, and no image that runs everything: every image is attacked to the end."""
NAMES = ["linf", "l2"]


@pytest.fixture
def toy() -> Logistic:
    return Logistic().eval()


@pytest.fixture
def small() -> Tensor:
    """Images of the toy network."""
    return torch.rand(24, 3, 2, 2, generator=torch.Generator().manual_seed(3))


def flops(network: DynamicNetwork, images: Tensor) -> Tensor:
    with torch.no_grad():
        return LEDGER(network(images).gates)


# ---- the same steps, written a second time ----


def by_hand(network: Logistic, clean: Array, *, norm: str, eps: float, steps: int, checkpoints: list[int]) -> tuple[list[Array], int]:
    """Croce and Hein's Algorithm 1 for one image of :class:`Logistic` in float64: every point evaluated, and how often the step was halved."""
    weight, bias = network.weight.detach().double().numpy(), network.bias.detach().double().numpy()
    lam = 5 * np.array([36.0] * 3 + [12.0] * 2) / 132.0

    def evaluate(x: Array) -> tuple[float, Array]:
        z = weight @ (x - 0.5) + bias
        return float(sum(lam * np.maximum(0.1 - z, 0))), -(lam * (z < 0.1)) @ weight

    def project(x: Array) -> Array:
        delta = x - clean
        if norm == "linf":
            delta = np.clip(delta, -eps, eps)
        elif (length := math.sqrt(float(delta @ delta))) > eps:
            delta = delta * eps / length
        return np.clip(clean + delta, 0, 1)

    def ascent(gradient: Array) -> Array:
        return -np.sign(gradient) if norm == "linf" else -gradient / (math.sqrt(float(gradient @ gradient)) or 1.0)

    points, losses, halvings = [clean], [evaluate(clean)[0]], 0
    eta, best, best_at_checkpoint, halved_at_checkpoint, previous_checkpoint = 2 * eps, clean, math.inf, True, 0
    x = before = clean
    fell: list[bool] = []
    for k in range(steps):
        if k in checkpoints:
            lowest = evaluate(best)[0]
            first = sum(fell[previous_checkpoint:k]) < 0.75 * (k - previous_checkpoint)
            second = not halved_at_checkpoint and best_at_checkpoint <= lowest
            halved_at_checkpoint, best_at_checkpoint, previous_checkpoint = first or second, lowest, k
            if halved_at_checkpoint:
                eta, x, before, halvings = eta / 2, best, best, halvings + 1
        z = project(x + eta * ascent(evaluate(x)[1]))
        following = z if k == 0 else project(x + 0.75 * (z - x) + 0.25 * (x - before))
        fell.append(evaluate(following)[0] < evaluate(x)[0])
        before, x = x, following
        points.append(x)
        losses.append(evaluate(x)[0])
        best = min((best, x), key=lambda point: evaluate(point)[0])
    return points, halvings


@pytest.mark.parametrize(("space", "norm"), list(zip(BALLS, NAMES, strict=True)), ids=NAMES)
def test_every_step_is_that_of_an_independent_implementation(space: Ball, norm: str, toy: Logistic, small: Tensor) -> None:
    seen: list[Tensor] = []
    toy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    ProjectedAttack(HingeLoss(), space=space, steps=40)(toy, small, ledger=ENDLESS)
    found = torch.stack(seen).flatten(2).double().numpy()
    assert len(found) == 41
    halvings = []
    for image in range(len(small)):
        clean = small[image].flatten().double().numpy()
        # ceil of 40 times 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99
        points, count = by_hand(toy, clean, norm=norm, eps=space.eps, steps=40, checkpoints=[9, 17, 23, 28, 32, 35, 38])
        halvings.append(count)
        # Here float32, there float64: the sign of a gradient near zero may differ, and a step halved once too often would show everywhere.
        assert (np.abs(found[:, image] - np.stack(points)) > 1e-4).mean() < 0.01
    assert min(halvings) < max(halvings) or norm == "linf"


def test_steps_are_reconsidered_where_the_paper_does() -> None:
    # Croce and Hein (2020), Sec. 3.1: p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), w_j = ceil(p_j N).
    assert sorted(step_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in [1, 2, 3, 5, 10, 20, 30, 50, 77, 200, 250, 1000, 5000]:
        before, p = Fraction(0), Fraction(22, 100)
        expected = set()
        while math.ceil(p * steps) < steps:
            expected.add(math.ceil(p * steps))
            before, p = p, p + max(p - before - Fraction(3, 100), Fraction(6, 100))
        assert step_checkpoints(steps) == expected


# ---- what is kept ----


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
def test_the_image_of_most_flops_then_of_least_error_is_kept(space: Ball, toy: Logistic, small: Tensor) -> None:
    seen: list[Tensor] = []
    toy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    found = ProjectedAttack(space=space, steps=12, restarts=3)(toy, small, ledger=ENDLESS)
    assert len(seen) == 3 * 13
    spent = torch.stack([flops(toy, images) for images in list(seen)])
    for image in range(len(small)):
        ranked = [(-spent[step, image].item(), (seen[step][image] - small[image]).square().mean().item(), step) for step in range(39)]
        assert found.step[image] == min(ranked)[2]
        assert torch.equal(found.images[image], seen[min(ranked)[2]][image])
    assert bool((found.step > 13).any())
    assert bool((flops(toy, found.images) >= flops(toy, small)).all())
    assert flops(toy, found.images).sum() > flops(toy, small).sum()


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
def test_an_image_that_runs_everything_is_done_and_the_others_go_on_as_before(space: Ball, toy: Logistic, small: Tensor) -> None:
    seen: list[Tensor] = []
    toy.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    attack = ProjectedAttack(space=space, steps=12, restarts=2)
    endless = attack(toy, small, ledger=ENDLESS)
    passes = list(seen)
    seen.clear()
    found = attack(toy, small, ledger=LEDGER)
    asked = [len(images) for images in seen]
    spent = torch.stack([flops(toy, images) for images in passes])
    done = [next((step for step, each in enumerate(row) if each == LEDGER.dense), len(passes)) for row in spent.T.tolist()]
    # Up to the pass in which it is done, an image is in every one of them.
    assert asked == [count for step in range(len(passes)) if (count := sum(last >= step for last in done))]
    assert min(done) < 13 <= max(done)
    assert torch.equal(flops(toy, found.images), flops(toy, endless.images))
    for image, last in enumerate(done):
        if last < len(passes):
            assert found.step[image] == last
            torch.testing.assert_close(found.images[image], passes[last][image], rtol=0, atol=1e-6)


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
@pytest.mark.parametrize("loss", [HingeLoss(), PowerLoss(), CheapestGateLoss()], ids=["hinge", "power", "cheapest"])
def test_restarts_never_lower_the_flops(loss: Any, space: Ball, toy: Logistic, small: Tensor) -> None:
    kept = [flops(toy, ProjectedAttack(loss, space=space, steps=6, restarts=restarts)(toy, small, ledger=LEDGER).images) for restarts in (1, 2, 5)]
    assert bool((kept[0] <= kept[1]).all() and (kept[1] <= kept[2]).all())


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
def test_more_steps_find_more(space: Ball, toy: Logistic, small: Tensor) -> None:
    # Not image by image: the step sizes of a longer run fall later.
    kept = [flops(toy, ProjectedAttack(space=space, steps=steps)(toy, small, ledger=LEDGER).images).sum().item() for steps in (1, 5, 25, 100)]
    assert kept == sorted(kept)


def test_the_cheapest_gate_is_opened_where_all_gates_at_once_cannot_be(toy: Logistic) -> None:
    """Two closed gates pull in opposite directions: the sum of their hinges moves nowhere, the nearest of them can be opened."""
    with torch.no_grad():
        toy.weight.zero_()
        toy.weight[0, 0], toy.weight[1, 0] = 4.0, -4.0
        toy.bias.copy_(torch.tensor([-0.55, -0.5, 3.0, 3.0, 3.0]))
    grey = torch.full((1, 3, 2, 2), 0.5)
    spent = [
        flops(toy, ProjectedAttack(loss, space=LinfBall(0.2), steps=30)(toy, grey, ledger=LEDGER).images).item()
        for loss in (HingeLoss(0.0), CheapestGateLoss())
    ]
    assert flops(toy, grey).item() == 108
    assert spent[1] == 144
    assert spent[1] >= spent[0]


@pytest.mark.parametrize("gamma", [0.3, 1.0, 3.0])
def test_within_the_error_of_gradmdm_it_finds_as_much(gamma: float, images: Tensor) -> None:
    torch.manual_seed(1)
    network = SkipNet(14, width=4).eval()
    ledger = price(network, images[:1])
    rival = GradMDM(gamma=gamma, steps=25, keep="best")(network, images, ledger=ledger).images
    # GradMDM gives each image an error of its own: the ball of an image is as wide.
    radii = (rival - images).square().sum((1, 2, 3)).sqrt().tolist()
    attacks = [ProjectedAttack(CheapestGateLoss(), space=L2Ball(radius), steps=25) for radius in radii]
    found = torch.cat([attack(network, image[None], ledger=ledger).images for attack, image in zip(attacks, images, strict=True)])
    assert bool(((found - images).square().sum((1, 2, 3)).sqrt() <= torch.tensor(radii) + 1e-6).all())
    with torch.no_grad():
        spent, rivals, clean = (ledger(network(each).gates) for each in (found, rival, images))
    assert spent.sum() >= rivals.sum() > clean.sum()


# ---- where it stays ----


@pytest.mark.parametrize("space", [LinfBall(4 / 255), L2Ball(0.5), L2Ball(30.0)], ids=["linf", "l2", "wide"])
@pytest.mark.parametrize("loss", [HingeLoss(), PowerLoss(), CheapestGateLoss()], ids=["hinge", "power", "cheapest"])
def test_adversarial_images_are_images_within_the_ball(loss: Any, space: Ball, network: SkipNet, images: Tensor) -> None:
    images[0], images[1] = 0.0, 1.0
    seen: list[Tensor] = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    found = ProjectedAttack(loss, ConflictMasking(), space=space, steps=5, restarts=2)(network, images, ledger=price(network, images[:1])).images
    assert (found.shape, found.dtype, found.requires_grad) == (images.shape, torch.float32, False)
    for perturbed in [found, *(x for x in seen if len(x) == 7)]:
        assert bool(((perturbed >= 0) & (perturbed <= 1)).all())
        change = (perturbed.double() - images.double()).flatten(1)
        assert (change.abs().max() if isinstance(space, LinfBall) else change.square().sum(1).sqrt().max()) <= space.eps + 1e-6


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
@pytest.mark.parametrize("loss", [HingeLoss(), CheapestGateLoss()], ids=["hinge", "cheapest"])
def test_a_batch_is_attacked_as_its_images_one_by_one_random_starts_included(loss: Any, space: Ball, toy: Logistic, small: Tensor) -> None:
    # A few steps: a rounding of the last bit, which depends on the place in the batch, grows from step to step.
    attack, small = ProjectedAttack(loss, ConflictMasking(), space=space, steps=6, restarts=3), small[:9]
    together, backwards = attack(toy, small, ledger=LEDGER), attack(toy, small.flip(0), ledger=LEDGER)
    alone = [attack(toy, image[None], ledger=LEDGER) for image in small]
    for images, step in (
        (backwards.images.flip(0), backwards.step.flip(0)),
        (torch.cat([each.images for each in alone]), torch.cat([each.step for each in alone])),
    ):
        torch.testing.assert_close(images, together.images, rtol=0, atol=1e-4)
        assert torch.equal(step, together.step)
    assert bool((together.step > 7).any())


@pytest.mark.parametrize("space", [LinfBall(0.1), L2Ball(3.0)], ids=NAMES)
def test_a_batch_of_a_convolutional_network_is_attacked_as_its_images(space: Ball, network: SkipNet, images: Tensor) -> None:
    attack, ledger = ProjectedAttack(space=space, steps=3, restarts=2), price(network, images[:1])
    together = attack(network, images, ledger=ledger)
    with torch.no_grad():
        spent = ledger(network(together.images).gates)
        for index, image in enumerate(images):
            alone = attack(network, image[None], ledger=ledger)
            # Convolutions round differently from one batch size to another, and the sign of a gradient near zero turns.
            assert ledger(network(alone.images).gates)[0] == spent[index]
            assert ((alone.images[0] - together.images[index]).abs() > 1e-4).float().mean() < 0.01


def test_an_attack_repeats_whatever_the_random_state_and_its_seed_matters(toy: Logistic, small: Tensor) -> None:
    attack = ProjectedAttack(steps=5, restarts=2)
    first = attack(toy, small, ledger=LEDGER)
    torch.manual_seed(99)
    assert torch.equal(attack(toy, small, ledger=LEDGER).images, first.images)
    one, other = (ProjectedAttack(CheapestGateLoss(), space=LinfBall(0.3), steps=5, restarts=2, seed=seed) for seed in (0, 1))
    assert not torch.equal(one(toy, small, ledger=LEDGER).images, other(toy, small, ledger=LEDGER).images)


# ---- networks that hide ----


def closed(network: Logistic) -> Tensor:
    """Twelve images on which every gate is closed, none of them by less than 0.02 in the logits of :class:`Logistic`."""
    drawn = torch.rand(4000, 3, 2, 2, generator=torch.Generator().manual_seed(8))
    logits = network.logits(drawn.flatten(1)).detach()
    return drawn[(logits < -0.15).all(1)][:12]


@pytest.mark.parametrize("space", [LinfBall(0.5), L2Ball(1.5)], ids=NAMES)
def test_saturated_gates_are_opened_in_logits_and_not_by_power(space: Ball) -> None:
    network = Saturated().eval()
    images = closed(network)
    assert len(images) == 12
    with torch.no_grad():
        assert not network.scores(images.flatten(1)).any()
    clean = flops(network, images)
    assert clean.tolist() == [48] * 12
    for dead in (ProjectedAttack(PowerLoss(), space=space), GradMDM(gamma=0.0, keep="best"), GradAuto(keep="best")):
        assert torch.equal(flops(network, dead(network, images, ledger=LEDGER).images), clean)
    for loss in (HingeLoss(), CheapestGateLoss()):
        assert bool((flops(network, ProjectedAttack(loss, space=space)(network, images, ledger=LEDGER).images) > clean).all())


@pytest.mark.parametrize("loss", [HingeLoss(), CheapestGateLoss()], ids=["hinge", "cheapest"])
def test_saturation_does_not_weaken_a_descent_in_logits(loss: Any) -> None:
    plain, saturated = Logistic().eval(), Saturated().eval()
    images = closed(plain)
    spent = [
        flops(network, ProjectedAttack(loss, space=LinfBall(0.3))(network, images, ledger=LEDGER).images).sum() for network in (plain, saturated)
    ]
    assert spent[1] > 0.8 * spent[0]


def test_without_a_path_of_gradients_only_the_search_opens_gates() -> None:
    network = Detached().eval()
    images = closed(network)
    for attack in (ProjectedAttack(steps=3), ProjectedAttack(PowerLoss(), ConflictMasking(), steps=3), GradMDM(steps=3)):
        with pytest.raises(NoGradientError, match="no gradient leads from the network's scores to its images.*SquareSearch.*straight_through"):
            attack(network, images, ledger=LEDGER)
    searched = SquareSearch(space=LinfBall(0.5), steps=200)(network, images, ledger=LEDGER).images
    assert bool((flops(network, searched) > flops(network, images)).all())


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
def test_a_nan_gradient_is_refused_and_its_image_named(space: Ball) -> None:
    network, images = Rooted(), torch.full((3, 3, 8, 8), 0.5)
    images[1] = 0.0
    with pytest.raises(ValueError, match=r"image 1 of the batch met a gradient that is NaN or infinite: it was not attacked"):
        ProjectedAttack(space=space, steps=2)(network, images, ledger=price(network, images[:1]))


# ---- what is refused and recorded ----


@pytest.mark.parametrize("settings", [{"steps": 0}, {"restarts": 0}, {"steps": -1}])
def test_settings_out_of_range_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="steps and restarts must be at least 1, got"):
        ProjectedAttack(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("first_step", [0.0, -1.0, math.inf, math.nan])
def test_a_first_step_is_positive(first_step: float) -> None:
    with pytest.raises(ValueError, match="first_step must be finite and positive, in radii, got"):
        ProjectedAttack(first_step=first_step)


def test_a_direction_needs_gates_to_choose_among() -> None:
    with pytest.raises(ValueError, match="direction ConflictMasking needs a loss over gates, got UniformExitsLoss"):
        ProjectedAttack(UniformExitsLoss(), ConflictMasking())


def test_a_loss_over_exits_needs_exits(toy: Logistic, small: Tensor) -> None:
    with pytest.raises(ValueError, match="DeepSloth attacks early exits, and this network returns none"):
        ProjectedAttack(UniformExitsLoss(), steps=1)(toy, small, ledger=LEDGER)
