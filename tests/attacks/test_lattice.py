"""8-bit attacks: images are levels to the last bit, inside their ball, and what is measured is what a PNG file carries."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tests.toys import LEDGER, Logistic
from torch import Tensor

from gatewatt import load, price
from gatewatt.attacks import (
    Attack,
    AutoEnergy,
    Ball,
    EnergyAttack,
    GradMDM,
    L2Ball,
    Lattice,
    LatticeBall,
    LinfBall,
    Noise,
    ProjectedAttack,
    ProjectionSpace,
    Space,
    SquareSearch,
    TanhSpace,
    UniversalAttack,
)
from gatewatt.attacks.lattice import whole_levels
from gatewatt.data import DigitsData

SPACES: dict[str, Space] = {"tanh": TanhSpace(), "projection": ProjectionSpace(), "linf": LinfBall(2.5 / 255), "l2": L2Ball(0.03)}
BALLS: list[Ball] = [LinfBall(4 / 255), LinfBall(2.5 / 255), LinfBall(0.5 / 255), L2Ball(0.01), L2Ball(0.1), L2Ball(1.0)]


def png(images: Tensor) -> Tensor:
    """Through bytes and back, as a file is written and read."""
    return torch.from_numpy((images.numpy() * 255).round().astype(np.uint8)).float() / 255


@pytest.fixture
def levels() -> Tensor:
    """8-bit images with black and white in them."""
    drawn = torch.randint(0, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(4))
    drawn[0], drawn[1], drawn[2, :, :4] = 0, 255, 0
    return drawn.float() / 255


@pytest.fixture
def small() -> Tensor:
    """8-bit images of the toy network."""
    return torch.randint(0, 256, (16, 3, 2, 2), generator=torch.Generator().manual_seed(3)).float() / 255


# ---- rounding ----


def by_hand(change: list[float], start: list[float], reach: float) -> list[float]:
    """One image: cut everything, then give back what was cut by most for as long as the length allows."""
    whole = [float(math.trunc(value)) for value in change]
    length = sum(value**2 for value in change)
    for index in sorted(range(len(change)), key=lambda index: -abs(change[index] - whole[index])):
        longer = whole[index] + math.copysign(1, change[index])
        if change[index] == whole[index] or abs(longer) > reach or not 0 <= start[index] + longer <= 255:
            continue
        grown = [*whole[:index], longer, *whole[index + 1 :]]
        if sum(value**2 for value in grown) > length:
            break
        whole = grown
    return whole


@pytest.mark.parametrize("scale", [0.05, 0.4, 3.0, 40.0])
@pytest.mark.parametrize("reach", [2.0, math.inf])
def test_rounding_is_that_of_a_loop_over_pixels(scale: float, reach: float) -> None:
    change, start = scale * torch.randn(9, 3, 4, 4), torch.randint(0, 256, (9, 3, 4, 4)).float()
    change = change.clamp(-reach, reach)
    change = (start + change).clamp(0, 255) - start
    change[0], change[1] = change[0].round(), 0.0
    found = whole_levels(change, start, reach)
    for index in range(9):
        assert found[index].flatten().tolist() == by_hand(change[index].flatten().tolist(), start[index].flatten().tolist(), reach)
    assert bool((found.square().sum((1, 2, 3)) <= change.double().square().sum((1, 2, 3)) + 1e-3).all())
    assert torch.equal(found[0], change[0])


def test_a_small_perturbation_keeps_its_length_where_the_nearest_levels_would_lose_it() -> None:
    change, start = 0.2 * torch.randn(5, 3, 32, 32), torch.full((5, 3, 32, 32), 100.0)
    kept = whole_levels(change, start).square().sum((1, 2, 3)) / change.square().sum((1, 2, 3))
    assert bool((kept > 0.99).all())
    assert bool((change.round().square().sum((1, 2, 3)) / change.square().sum((1, 2, 3)) < 0.4).all())


# ---- spaces ----


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_no_perturbation_changes_not_a_bit(space: Space, levels: Tensor) -> None:
    lattice = Lattice(space)
    assert torch.equal(lattice.image(lattice.encode(levels), torch.zeros_like(levels)), levels)


@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
@pytest.mark.parametrize("size", [1e-4, 3e-3, 0.1, 10.0])
def test_images_are_levels_to_the_last_bit_and_near_those_of_the_inner_space(space: Space, size: float, levels: Tensor) -> None:
    lattice = Lattice(space)
    delta = lattice.restrict(levels, size * torch.randn_like(levels))
    image = lattice.image(lattice.encode(levels), delta)
    assert torch.equal(png(image), image)
    anchor = space.encode(levels)
    change, whole = (space.image(anchor, delta) - space.image(anchor, 0 * delta)).double(), (image - levels).double()
    assert (255 * (change - whole)).abs().max() < 1 + 1e-3
    assert bool((whole.flatten(1).norm(dim=1) <= change.flatten(1).norm(dim=1) * (1 + 1e-4) + 1e-6).all())


@pytest.mark.parametrize("wrap", [Lattice, LatticeBall])
@pytest.mark.parametrize("ball", BALLS, ids=lambda ball: f"{type(ball).__name__}-{ball.eps:.4f}")
@pytest.mark.parametrize("size", [1e-3, 0.05, 100.0])
def test_what_is_rounded_stays_in_the_ball(ball: Ball, size: float, wrap: Callable[[Ball], Lattice], levels: Tensor) -> None:
    lattice = wrap(ball)
    change = lattice.image(levels, lattice.restrict(levels, size * torch.randn_like(levels))).double() - levels.double()
    norms = change.abs().flatten(1).amax(1) if isinstance(ball, LinfBall) else change.flatten(1).norm(dim=1)
    assert norms.max() <= ball.eps + 1e-6
    if ball.eps * 255 < 1 and isinstance(ball, LinfBall):
        assert not change.any()


def test_a_ball_of_levels_is_the_ball(levels: Tensor) -> None:
    for ball in BALLS:
        lattice, gradient = LatticeBall(ball), torch.randn_like(levels)
        assert (lattice.eps, lattice.order) == (ball.eps, ball.order)
        assert torch.equal(lattice.steepest(gradient), ball.steepest(gradient))
        assert torch.equal(lattice.ball(gradient), ball.ball(gradient))
        assert torch.equal(lattice.within(gradient.sigmoid()), ball.within(gradient.sigmoid()))


def test_the_gradient_passes_straight_through_also_at_black_and_white() -> None:
    image, gradient = torch.tensor([0.0, 0.25, 1.0]).view(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    assert torch.equal(Lattice(ProjectionSpace()).pullback(image, gradient), gradient)
    slopes = Lattice(TanhSpace()).pullback(image, gradient).flatten().tolist()
    assert slopes == pytest.approx([2 * 0.25 / 255, 0.375, 2 * 0.25 / 255], rel=0.01)


def test_images_that_are_no_levels_are_refused(levels: Tensor) -> None:
    with pytest.raises(ValueError, match="starts from 8-bit images, multiples of 1/255; these are not: round them first"):
        GradMDM(steps=1, space=Lattice(TanhSpace()))(Logistic().eval(), torch.rand(2, 3, 2, 2), ledger=LEDGER)


# ---- attacks ----

ATTACKS: dict[str, Callable[[], Attack]] = {
    **{name: lambda space=space: GradMDM(gamma=1.0, steps=15, lr=0.05, space=Lattice(space), keep="best") for name, space in SPACES.items()},  # type: ignore[misc]
    "last": lambda: EnergyAttack(gamma=1.0, steps=15, lr=0.05, space=Lattice(TanhSpace())),
    "pgd-linf": lambda: ProjectedAttack(space=LatticeBall(LinfBall(4 / 255)), steps=12, restarts=2),
    "pgd-l2": lambda: ProjectedAttack(space=LatticeBall(L2Ball(0.05)), steps=12, restarts=2),
    "square-linf": lambda: SquareSearch(space=LatticeBall(LinfBall(4 / 255)), steps=20),
    "square-l2": lambda: SquareSearch(space=LatticeBall(L2Ball(0.05)), steps=20),
    "noise": lambda: Noise("gaussian", space=LatticeBall(L2Ball(0.05))),
    "auto-linf": lambda: AutoEnergy("linf", 4 / 255, steps=6, lattice=True),
    "auto-l2": lambda: AutoEnergy("l2", 0.05, steps=6, lattice=True),
    "universal": lambda: UniversalAttack(space=LatticeBall(LinfBall(4 / 255)), steps=6),
}


def attacked(name: str, images: Tensor, fitted_to: Tensor) -> Tensor:
    attack = ATTACKS[name]()
    if isinstance(attack, UniversalAttack):
        attack.fit(Logistic().eval(), [fitted_to], ledger=LEDGER)
    return attack(Logistic().eval(), images, ledger=LEDGER).images


@pytest.mark.parametrize("name", ATTACKS)
def test_saving_changes_nothing_gates_included(name: str, small: Tensor) -> None:
    network, found = Logistic().eval(), attacked(name, small, small)
    saved = png(found)
    assert torch.equal(saved, found)
    with torch.no_grad():
        before, after = network(found), network(saved)
    assert all(torch.equal(before.gates[gate].executed, after.gates[gate].executed) for gate in before.gates)
    assert not torch.equal(found, small)
    for index, image in enumerate(small[:4]):
        assert torch.equal(attacked(name, image[None], small)[0], found[index])
    if "l2" in name and name != "l2":
        assert (found - small).double().flatten(1).norm(dim=1).max() <= 0.05 + 1e-6
    if "-linf" in name or name == "universal":
        assert (found - small).abs().max() <= 4 / 255 + 1e-6


def test_at_small_budgets_more_survives_than_rounding_afterwards_leaves() -> None:
    """A trained network and real digits, in an L2 ball of 0.03: at most 0.14 levels a pixel on average."""
    data = DigitsData(test_images=16, eval_batch_size=16)
    data.setup("test")
    images, network = next(iter(data.test_dataloader())).images, load("sact-20-digits").eval()
    ledger = price(network, images[:1])

    def spent(perturbed: Tensor) -> float:
        with torch.no_grad():
            return float(ledger(network(perturbed).gates).sum())

    ball = L2Ball(0.03)
    plain, lattice = (ProjectedAttack(space=space, steps=12)(network, images, ledger=ledger).images for space in (ball, LatticeBall(ball)))
    clean, recovered, rounded, kept = (spent(version) for version in (images, plain, png(plain), lattice))
    assert recovered > clean
    assert rounded - clean < 0.1 * (recovered - clean)
    assert kept - clean > 0.3 * (recovered - clean)
    assert spent(png(lattice)) == kept
    assert (lattice - images).double().flatten(1).norm(dim=1).max() <= 0.03 + 1e-6
