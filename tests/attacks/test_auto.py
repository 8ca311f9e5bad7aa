"""AutoEnergy: the worst case of its members, image by image, and nothing that depends on their company."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from tests.toys import LEDGER, Detached, Logistic, Rooted
from torch import Tensor

from gatewatt.attacks import AutoEnergy, BrokenGradientError, L2Ball, LinfBall, Noise, ProjectedAttack, SquareSearch, auto, under_attack
from gatewatt.attacks.auto import MEMBERS, ROUNDS, member
from gatewatt.defenses import BudgetGuard
from gatewatt.flops import FlopsLedger, price
from gatewatt.gating import DynamicNetwork, Forced, gate_table
from gatewatt.metrics import round_to_8bit
from gatewatt.networks import SkipNet

NORMS = ["linf", "l2"]
EPS = {"linf": 0.08, "l2": 0.3}


@pytest.fixture
def toy() -> Logistic:
    return Logistic().eval()


@pytest.fixture
def small() -> Tensor:
    """Images of the toy network."""
    return torch.rand(24, 3, 2, 2, generator=torch.Generator().manual_seed(3))


def flops(network: DynamicNetwork, images: Tensor, ledger: FlopsLedger = LEDGER) -> Tensor:
    with torch.no_grad():
        return ledger(network(images, "skipped").gates)


@pytest.mark.parametrize("norm", NORMS)
def test_no_member_does_better_on_any_image(norm: Any, toy: Logistic, small: Tensor) -> None:
    attack = AutoEnergy(norm, EPS[norm], steps=10)
    found = attack(toy, small, ledger=LEDGER)
    spent = flops(toy, found.images)
    alone = {name: each(toy, small, ledger=LEDGER) for name, each in attack.members.items()}
    assert list(alone) == list(MEMBERS)
    for result in alone.values():
        assert bool((spent >= flops(toy, result.images)).all())
    assert bool((spent >= flops(toy, small)).all())
    assert found.member is not None
    assert len(found.member.unique()) > 2
    for index, winner in enumerate(found.member.tolist()):
        if winner < 0:
            assert torch.equal(found.images[index], small[index])
            continue
        if ROUNDS[winner] == "continued":
            assert spent[index] >= max(flops(toy, result.images)[index] for result in alone.values())
            continue
        result = alone[ROUNDS[winner]]
        # The member's own perturbation, scaled down.
        theirs, ours = (each[index] - small[index] for each in (result.images, found.images))
        share = (ours * theirs).sum() / theirs.square().sum()
        assert 0 < share <= 1 + 1e-6
        torch.testing.assert_close(ours, share * theirs, rtol=0, atol=1e-6)
        assert found.step[index] == result.step[index]


@pytest.mark.parametrize("norm", NORMS)
def test_no_member_does_better_on_any_image_of_a_convolutional_network(norm: Any, images: Tensor) -> None:
    torch.manual_seed(1)
    network = SkipNet(14, width=4).eval()
    ledger = price(network, images[:1])
    attack = AutoEnergy(norm, {"linf": 0.2, "l2": 6.0}[norm], steps=4)
    found = attack(network, images, ledger=ledger)
    spent = flops(network, found.images, ledger)
    for each in attack.members.values():
        assert bool((spent >= flops(network, each(network, images, ledger=ledger).images, ledger)).all())
    assert spent.sum() > flops(network, images, ledger).sum()


@pytest.mark.parametrize("norm", NORMS)
def test_images_are_valid_and_in_the_ball_and_a_batch_is_its_images(norm: Any, toy: Logistic, small: Tensor) -> None:
    small[0], small[1] = 0.0, 1.0
    attack = AutoEnergy(norm, EPS[norm], steps=6)
    found = attack(toy, small, torch.zeros(24, dtype=torch.long), ledger=LEDGER)
    assert bool(((found.images >= 0) & (found.images <= 1)).all())
    change = (found.images.double() - small.double()).flatten(1)
    assert (change.abs().max() if norm == "linf" else change.square().sum(1).sqrt().max()) <= attack.eps + 1e-6
    assert found.member is not None
    for index, image in enumerate(small):
        alone = attack(toy, image[None], torch.zeros(1, dtype=torch.long), ledger=LEDGER)
        torch.testing.assert_close(alone.images[0], found.images[index], rtol=0, atol=1e-6)
        assert alone.member is not None
        assert alone.member[0] == found.member[index]


def test_the_last_descent_goes_on_from_the_best_of_the_members(images: Tensor) -> None:
    torch.manual_seed(1)
    network = SkipNet(14, width=4).eval()
    ledger = price(network, images[:1])
    attack = AutoEnergy("linf", 0.2, steps=2)
    found = attack(network, images, ledger=ledger)
    members = [each(network, images, ledger=ledger).images for each in attack.members.values()]
    best = torch.stack([flops(network, each, ledger) for each in members]).amax(0)
    assert found.member is not None
    last = found.member == ROUNDS.index("continued")
    spent = flops(network, found.images, ledger)
    assert bool((spent >= best).all())
    assert bool((spent > best)[last].any())
    # The start is the first iterate, so that nothing is lost of it.
    start = attack.members["square"](network, images, ledger=ledger).images
    with under_attack(network):
        resumed = attack.continuation.craft_from(start, network, images, ledger)
    assert bool((flops(network, resumed.images, ledger) >= flops(network, start, ledger)).all())


@pytest.mark.parametrize("lattice", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_perturbations_shrink_for_as_long_as_nothing_is_lost(
    norm: Any, lattice: bool, toy: Logistic, small: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = round_to_8bit(small)
    attack = AutoEnergy(norm, EPS[norm], steps=10, lattice=lattice)
    shrunk = attack(toy, small, ledger=LEDGER)
    monkeypatch.setattr(auto, "HALVINGS", 0)
    whole = attack(toy, small, ledger=LEDGER)
    assert shrunk.member is not None
    assert whole.member is not None
    assert torch.equal(shrunk.member, whole.member)
    assert torch.equal(shrunk.step, whole.step)
    for saved in (lambda images: images, round_to_8bit):
        assert bool((flops(toy, saved(shrunk.images)) >= flops(toy, saved(whole.images))).all())
    error, before = ((each.images - small).square().flatten(1).sum(1) for each in (shrunk, whole))
    assert bool((error <= before).all())
    assert error.sum() < 0.8 * before.sum()
    if lattice:
        torch.testing.assert_close(round_to_8bit(shrunk.images), shrunk.images, rtol=0, atol=1e-6)
        return
    # Nearly the least: one image in two loses something, as it is or saved, at nine tenths of what is left.
    less = small + 0.9 * (shrunk.images - small)
    lost = (flops(toy, less) < flops(toy, shrunk.images)) | (flops(toy, round_to_8bit(less)) < flops(toy, round_to_8bit(shrunk.images)))
    assert lost[error > 0].float().mean() > 0.5


def test_eight_bits_are_those_that_records_are_measured_at(small: Tensor) -> None:
    # Also halves and both ends.
    images = torch.cat([small.flatten(), torch.arange(511) / 510])
    assert torch.equal(auto.eight_bit(images), round_to_8bit(images))


def test_what_members_make_under_autocast_is_judged_in_float32(toy: Logistic, small: Tensor) -> None:
    attack = AutoEnergy("linf", EPS["linf"], steps=4)
    judged: list[torch.dtype] = []
    toy.register_forward_pre_hook(lambda module, inputs: judged.append(torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        attack(toy, small, ledger=LEDGER)
    assert set(judged) == {torch.bfloat16, torch.float32}
    assert judged[0] == judged[-1] == torch.float32


def test_images_that_run_everything_are_left_alone(toy: Logistic, small: Tensor) -> None:
    with torch.no_grad():
        toy.bias[:] = 20.0
    seen: list[int] = []
    toy.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = AutoEnergy(steps=3)(toy, small, ledger=LEDGER)
    assert seen == [24]
    assert torch.equal(found.images, small)
    assert found.member is not None
    assert found.member.tolist() == [-1] * 24
    assert found.step.tolist() == [0] * 24


def test_images_that_a_guard_already_cuts_short_are_left_alone(images: Tensor) -> None:
    inner = SkipNet(depth=14, width=4).eval()
    with torch.no_grad():
        inner.gating.projection.bias.fill_(9.0)
    ledger = price(inner, images[:1])
    first_two = sum(ledger.prices[f"trunk.blocks.{index}.residual"] for index in (1, 2))
    guarded = BudgetGuard(inner, (ledger.fixed + first_two) / ledger.dense)
    seen: list[int] = []
    inner.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found = AutoEnergy(steps=2)(guarded, images, ledger=ledger)
    # One image to see how gates are nested, then what all of them cost.
    assert seen == [1, len(images)]
    assert torch.equal(found.images, images)


def test_noise_of_the_same_norm_does_worse(toy: Logistic, small: Tensor) -> None:
    for norm in NORMS:
        attack = AutoEnergy(norm, EPS[norm], steps=10)  # type: ignore[arg-type]
        space = LinfBall(EPS[norm]) if norm == "linf" else L2Ball(EPS[norm])
        worst = flops(toy, attack(toy, small, ledger=LEDGER).images).sum() - flops(toy, small).sum()
        for kind in ("uniform", "gaussian", "shift", "flat"):
            noisy = Noise(kind, space=space)(toy, small, ledger=LEDGER).images  # type: ignore[arg-type]
            assert flops(toy, noisy).sum() - flops(toy, small).sum() < 0.7 * worst


def test_the_search_alone_is_left_where_no_gradient_leads_to_the_image(small: Tensor) -> None:
    network = Detached().eval()
    found = AutoEnergy("linf", 0.3, steps=30)(network, small, ledger=LEDGER)
    assert found.member is not None
    assert set(found.member.tolist()) <= {-1, MEMBERS.index("square")}
    assert flops(network, found.images).sum() > flops(network, small).sum()


def test_a_broken_gradient_is_refused_and_the_image_of_the_whole_batch_named() -> None:
    network, images = Rooted(), torch.full((4, 3, 8, 8), 0.5)
    with torch.no_grad():
        # Bright images run everything already, so that the members see the last two alone.
        network.scores.weight.fill_(1.0)
        network.scores.bias.fill_(-1.5)
    images[:2], images[3] = 0.9, 0.0
    with pytest.raises(BrokenGradientError, match="image 3 of the batch met a gradient that is NaN or infinite"):
        AutoEnergy(steps=1)(network, images, ledger=price(network, images[:1]))


def test_the_networks_own_decision_judges_and_is_given_back(toy: Logistic, small: Tensor) -> None:
    own = Forced({"a": torch.zeros(24, 3), "b": torch.ones(24, 2)})
    toy.decision = own
    ledger = LEDGER
    found = AutoEnergy(steps=2)(toy, small, ledger=ledger)
    assert toy.decision is own
    # Whatever the straight-through member saw, nothing that it found runs more than before.
    assert found.member is not None
    assert found.member.tolist() == [-1] * 24
    assert torch.equal(gate_table(toy(found.images).gates).executed, torch.tensor([0.0, 0, 0, 1, 1]).expand(24, 5))


def test_members_are_those_that_their_names_say() -> None:
    space = LinfBall(0.1)
    made = {name: member(name, space, 7) for name in MEMBERS}
    kinds: dict[str, Any] = {name: each.settings.get("loss", {}).get("kind") for name, each in made.items()}
    cheapest = "CheapestGateLoss"
    assert kinds == {"hinge": "HingeLoss", "power-cgm": "PowerLoss", "cheapest": cheapest, "straight-through": cheapest, "square": None}
    assert made["power-cgm"].settings["direction"] == {"kind": "ConflictMasking"}
    assert made["straight-through"].decision == "straight_through"
    assert all(each.settings["space"] == {"kind": "LinfBall", "eps": 0.1} for each in made.values())
    assert [each.steps * getattr(each, "restarts", 1) for each in made.values() if isinstance(each, (ProjectedAttack, SquareSearch))] == [
        7,
        7,
        28,
        6,
        14,
    ]
    with pytest.raises(ValueError, match="member must be one of hinge, power-cgm, cheapest, straight-through, square, got 'pgd'"):
        member("pgd", space, 7)


def test_the_radius_fits_the_norm() -> None:
    assert (AutoEnergy().eps, AutoEnergy("l2").eps, AutoEnergy("l2", 2).eps) == (4 / 255, 0.5, 2.0)
    assert repr(AutoEnergy("l2", 2, steps=3)) == "AutoEnergy(l2, eps=2, steps=3)"


@pytest.mark.parametrize(
    ("norm", "eps", "steps", "message"),
    [
        ("l1", 0.1, 1, "norm must be linf or l2, got 'l1'"),
        ("linf", 0.1, 0, "steps must be at least 1, got 0"),
        ("l2", 0.0, 1, "eps must be finite and positive, .* got 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(norm: Literal["linf", "l2"], eps: float, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoEnergy(norm, eps, steps=steps)
