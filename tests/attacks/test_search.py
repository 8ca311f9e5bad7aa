"""The black-box search: valid proposals, judged by what a pass that skips really spends, and a function of seed and image alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tests.toys import LEDGER, Detached, Logistic
from torch import Tensor

from gatewatt.attacks import Ball, L2Ball, LinfBall, SquareSearch
from gatewatt.gating import DynamicNetwork, DynamicOutput, Execution

BALLS: list[Ball] = [LinfBall(0.2), L2Ball(0.8)]
NAMES = ["linf", "l2"]
ENDLESS = replace(LEDGER, dense=1e9)
"""The same prices, and no image that runs everything: every image is asked about to the end."""


class Watched(Detached):
    """Notes every image that it is asked about, how, and whether gradients were on."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Execution, bool]] = []

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        self.asked.append((images.clone(), execution, torch.is_grad_enabled()))
        return super().forward(images, execution)


@pytest.fixture
def small() -> Tensor:
    """Images of the toy network, two of them at the ends of the range."""
    drawn = torch.rand(16, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    drawn[0], drawn[1] = 0.0, 1.0
    return drawn


def flops(network: DynamicNetwork, images: Tensor) -> Tensor:
    with torch.no_grad():
        return LEDGER(network(images).gates)


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
def test_it_asks_for_flops_alone_and_keeps_the_most(space: Ball, small: Tensor) -> None:
    network = Watched().eval()
    found = SquareSearch(space=space, steps=30)(network, small, ledger=ENDLESS)
    assert len(network.asked) == 31
    assert {(execution, gradients) for _, execution, gradients in network.asked} == {("skipped", False)}
    assert torch.equal(network.asked[0][0], small)
    spent = torch.stack([flops(Logistic().eval(), images) for images, _, _ in network.asked])
    assert torch.equal(flops(network, found.images), spent.max(0).values)
    for index, step in enumerate(found.step.tolist()):
        assert torch.equal(found.images[index], network.asked[step][0][index])
    assert spent.max(0).values.sum() > spent[0].sum()


def test_an_image_that_runs_everything_is_asked_about_no_more(small: Tensor) -> None:
    network = Watched().eval()
    found = SquareSearch(space=BALLS[0], steps=30)(network, small, ledger=LEDGER)
    counts = [len(images) for images, _, _ in network.asked]
    done = flops(network, found.images) == LEDGER.dense
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 16 > counts[-1]
    # An image is in the clean pass and in every query up to the one that opens everything.
    assert sum(counts) == int(torch.where(done, found.step, 30).sum()) + 16


def test_a_network_that_cannot_skip_is_asked_for_masked_passes(small: Tensor) -> None:
    network = Watched().eval()
    network.executions = ("masked", "dense")
    SquareSearch(steps=3)(network, small, ledger=LEDGER)
    assert {execution for _, execution, _ in network.asked} == {"masked"}


@pytest.mark.parametrize("space", [*BALLS, LinfBall(4 / 255), L2Ball(20.0)], ids=[*NAMES, "narrow", "wide"])
def test_every_proposal_is_an_image_within_the_ball(space: Ball, small: Tensor) -> None:
    network = Watched().eval()
    SquareSearch(space=space, steps=25)(network, small, ledger=ENDLESS)
    for images, _, _ in network.asked:
        assert bool(((images >= 0) & (images <= 1)).all())
        change = (images.double() - small.double()).flatten(1)
        assert (change.abs().max() if isinstance(space, LinfBall) else change.square().sum(1).sqrt().max()) <= space.eps + 1e-6


@pytest.mark.parametrize("space", BALLS, ids=NAMES)
def test_a_batch_is_attacked_as_its_images_one_by_one(space: Ball, small: Tensor) -> None:
    attack, network = SquareSearch(space=space, steps=20), Logistic().eval()
    together = attack(network, small, ledger=LEDGER)
    torch.testing.assert_close(attack(network, small.flip(0), ledger=LEDGER).images.flip(0), together.images, rtol=0, atol=1e-6)
    for index, image in enumerate(small):
        alone = attack(network, image[None], ledger=LEDGER)
        torch.testing.assert_close(alone.images[0], together.images[index], rtol=0, atol=1e-6)
        assert alone.step[0] == together.step[index]


class Coarse(Watched):
    """Looks at four pixels of images of 16x16."""

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        self.asked.append((images.clone(), execution, False))
        return Detached.forward(self, images[:, :, ::8, ::8], execution)


def test_stripes_come_first_and_squares_shrink() -> None:
    network, grey = Coarse().eval(), torch.full((1, 3, 16, 16), 0.5)
    SquareSearch(space=LinfBall(0.4), steps=200, area=0.3)(network, grey, ledger=ENDLESS)
    changes = [(images - grey)[0] for images, _, _ in network.asked]
    torch.testing.assert_close(changes[1].abs(), torch.full((3, 16, 16), 0.4), rtol=0, atol=1e-6)
    assert bool((changes[1] == changes[1][:, :1]).all())
    assert len(changes[1].unique()) == 2

    with torch.no_grad():
        spent = [LEDGER(Logistic().eval()(images[:, :, ::8, ::8]).gates).item() for images, _, _ in network.asked]
    assert len(set(spent)) > 2
    # 0.3 of 256 pixels, halved twice by the second query of 200 (fractions 0.001 and 0.005 are past) and nine times in the end.
    shares = {2: 4, 100: 128, 200: 512}
    current, level, refused, walked = changes[0], spent[0], 0, 0
    for step in range(1, 201):
        if step > 1:
            rows, columns = ((changes[step] - current).abs().amax(0) > 1e-6).nonzero(as_tuple=True)
            side = int(max(rows.max() - rows.min(), columns.max() - columns.min())) + 1 if len(rows) else 0
            # One square on what was accepted last; where a colour was there already, less is seen of it.
            assert side <= max(round(math.sqrt(0.3 * 256 / shares.get(step, 1))), 1)
            assert len(torch.unique(changes[step][:, rows, columns].round(decimals=4), dim=1).T) <= 1
        walked, refused = walked + (spent[step] == level), refused + (spent[step] < level)
        if spent[step] >= level:
            current, level = changes[step], spent[step]
    assert refused > 0
    assert walked > 5


def test_the_seed_matters(small: Tensor) -> None:
    asked = []
    for seed in (0, 1):
        network = Watched().eval()
        SquareSearch(steps=3, seed=seed)(network, small, ledger=ENDLESS)
        asked.append(torch.stack([images for images, _, _ in network.asked[1:]]))
    assert bool((asked[0] != asked[1]).flatten(2).any(2).any(0).all())


@pytest.mark.parametrize("settings", [{"steps": 0}, {"area": 0.0}, {"area": 1.1}, {"area": float("nan")}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"steps must be at least 1 and area in \(0, 1\], got"):
        SquareSearch(**settings)  # type: ignore[arg-type]
