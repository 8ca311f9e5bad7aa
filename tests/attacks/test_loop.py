"""The loop: against an independent implementation, image by image, in its aims and in what it keeps."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.toys import LEDGER, Logistic
from torch import Tensor, nn

from gatewatt.attacks import (
    ABLATIONS,
    ILFO,
    ComplexityLoss,
    ComplexityOnly,
    ConflictMasking,
    EnergyAttack,
    GradAuto,
    GradMDM,
    HingeLoss,
    Joint,
    LinfBall,
    PowerLoss,
    ProjectionSpace,
    Space,
    TanhSpace,
    UnitLength,
    ablation,
)
from gatewatt.flops import price
from gatewatt.gating import gate_table
from gatewatt.networks import SkipNet

Array = NDArray[np.float64]

LAMBDA = 5 * np.array([36.0] * 3 + [12.0] * 2) / 132.0
"""The units' shares of what can be saved, 108 / 3 and 24 / 2 MACs each, times their number."""


@pytest.fixture
def toy() -> Logistic:
    return Logistic().eval()


@pytest.fixture
def small() -> Tensor:
    """Images of the toy network."""
    return torch.rand(24, 3, 2, 2, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def unfinished(toy: Logistic) -> Tensor:
    """As many images with something left to open.

    One that runs everything has no gradient but that of its own way through tanh and back, which is rounding, and Adam divides it by its size.
    """
    drawn = torch.rand(96, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        closed = (gate_table(toy(drawn).gates).executed == 0).any(1)
    return drawn[closed][:24]


class Trajectory:
    """Every image that enters a network."""

    def __init__(self, network: nn.Module) -> None:
        self.images: list[Tensor] = []
        network.register_forward_pre_hook(lambda module, inputs: self.images.append(inputs[0].detach().clone()))


# ---- the same steps, written a second time ----


def by_hand(
    network: Logistic, images: Tensor, *, method: str, space: str, gamma: float, steps: int, warm: int, lr: float, alpha: float, literal: bool
) -> tuple[list[Array], int]:
    """The whole attack on :class:`Logistic` in float64 numpy: own gradients, own Adam. Returns all iterates and the number of conflicts."""
    weight, bias = network.weight.detach().double().numpy(), network.bias.detach().double().numpy()
    clean = images.double().numpy().reshape(len(images), -1)
    count, pixels = clean.shape
    start = np.arctanh(2 * np.clip(clean, 1e-4, 1 - 1e-4) - 1)
    delta, mean, square = (np.zeros_like(clean) for _ in range(3))
    iterates, conflicts = [], 0

    def perturbed() -> Array:
        return (np.tanh(start + delta) + 1) / 2 if space == "tanh" else clean + delta

    for step in range(1, steps + 1):
        x = perturbed()
        iterates.append(x)
        chain = 2 * x * (1 - x) if space == "tanh" else np.ones_like(x)
        gradient = np.zeros_like(x)
        for image in range(count):
            score = 1 / (1 + np.exp(-(weight @ (x[image] - 0.5) + bias)))
            closed, opened = score < 0.5, score > 0.5
            slope = LAMBDA * score * (1 - score)  # lambda_i dG_i / d(w_i x)
            power = 1.0 if step <= warm or method in ("Eq5", "Eq6", "CGM", "GradAuto") else alpha
            g_closed = chain[image] * (-(slope * power * score ** (power - 1) * closed) @ weight)
            g_open = chain[image] * (-(slope * opened) @ weight)
            if step <= warm or method in ("Eq6", "Power"):
                chosen = g_closed
            elif method in ("Eq5", "PowerJoint"):
                chosen = g_closed + g_open
            else:
                inner = float(g_closed @ g_open)
                conflicts += inner < 0
                chosen = g_closed - inner / float(g_open @ g_open) * g_open if inner < 0 else g_closed
            if step > warm and method == "GradAuto":
                chosen = chosen / (np.sqrt(float(chosen @ chosen)) or 1.0)
            gradient[image] = chosen + gamma * 2 * (x[image] - clean[image]) / (1 if literal else pixels) * chain[image]
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        delta = delta - lr * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
        if space != "tanh":
            delta = np.clip(delta, -0.05, 0.05) if space == "ball" else delta
            delta = np.clip(clean + delta, 0, 1) - clean
    return [*iterates, perturbed()], conflicts


METHODS: dict[str, tuple[Any, Any]] = {
    "Eq5": (ComplexityLoss, Joint),
    "Eq6": (ComplexityLoss, ComplexityOnly),
    "CGM": (ComplexityLoss, ConflictMasking),
    "Power": (PowerLoss, ComplexityOnly),
    "PowerJoint": (PowerLoss, Joint),
    "GradMDM": (PowerLoss, ConflictMasking),
    "GradAuto": (ComplexityLoss, UnitLength),
}
BY_NAME: dict[str, Space] = {"tanh": TanhSpace(), "projection": ProjectionSpace(), "ball": LinfBall(0.05)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("space", BY_NAME)
@pytest.mark.parametrize("method", METHODS)
def test_every_step_is_that_of_an_independent_implementation(method: str, space: str, reduction: Any, toy: Logistic, unfinished: Tensor) -> None:
    assert len(unfinished) == 24
    settings = {"gamma": 0.7, "steps": 10, "lr": 0.03}
    expected, conflicts = by_hand(toy, unfinished, method=method, space=space, warm=2, alpha=4.0, literal=reduction == "sum", **settings)
    loss, direction = METHODS[method]
    attack = EnergyAttack(loss(), direction(), space=BY_NAME[space], warmup=0.2, reduction=reduction, **settings)
    trajectory = Trajectory(toy)
    final = attack(toy, unfinished, ledger=LEDGER).images
    found = [*trajectory.images, final]
    assert len(found) == len(expected) == 11
    # Not closer than this: the loop itself runs in float32, whatever it is given, and the reference in float64.
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.flatten(1).double().numpy(), other, rtol=0, atol=2e-5)
    assert np.abs(expected[-1] - expected[0]).max() > 0.02
    if method in ("CGM", "GradMDM", "GradAuto"):
        assert conflicts > 20


def test_gradmdm_is_the_power_loss_with_masking(toy: Logistic, small: Tensor) -> None:
    plain = EnergyAttack(PowerLoss(3.0), ConflictMasking(), gamma=2.0, steps=7, lr=0.02)
    assert torch.equal(plain(toy, small, ledger=LEDGER).images, GradMDM(3.0, gamma=2.0, steps=7, lr=0.02)(toy, small, ledger=LEDGER).images)


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_gradmdm_in_loss_and_direction_alone(name: str) -> None:
    attack, whole = ablation(name, gamma=3.0, steps=9, keep="best"), GradMDM(gamma=3.0, steps=9, keep="best")
    loss, direction = METHODS[name]
    assert (type(attack.loss), type(attack.direction), attack.name) == (loss, direction, name)
    same = {key: value for key, value in whole.settings.items() if key not in ("name", "loss", "direction")}
    assert {key: attack.settings[key] for key in same} == same


def test_an_unknown_ablation_is_refused() -> None:
    with pytest.raises(ValueError, match="ablation must be one of Eq5, Eq6, CGM, Power, PowerJoint, got 'Eq9'"):
        ablation("Eq9")


def test_alpha_1_without_masking_is_eq_6(toy: Logistic, small: Tensor) -> None:
    power = EnergyAttack(PowerLoss(1.0), ComplexityOnly(), gamma=1.0, steps=8)
    assert torch.equal(power(toy, small, ledger=LEDGER).images, ablation("Eq6", gamma=1.0, steps=8)(toy, small, ledger=LEDGER).images)


def test_a_warm_up_of_all_steps_is_eq_6(toy: Logistic, small: Tensor) -> None:
    warm = GradMDM(gamma=1.0, steps=8, warmup=1.0)
    assert torch.equal(warm(toy, small, ledger=LEDGER).images, ablation("Eq6", gamma=1.0, steps=8)(toy, small, ledger=LEDGER).images)


def test_ilfo_is_eq_6_towards_levels_of_its_own(toy: Logistic, small: Tensor) -> None:
    plain = ILFO(gamma=1.0, steps=8)(toy, small, ledger=LEDGER).images
    warm_up_is_eq_6_too = ablation("Eq6", gamma=1.0, steps=8)
    assert torch.equal(plain, warm_up_is_eq_6_too(toy, small, ledger=LEDGER).images)
    assert torch.equal(plain, ILFO([0.5] * 5, gamma=1.0, steps=8)(toy, small, ledger=LEDGER).images)

    def scores(levels: list[float]) -> Tensor:
        with torch.no_grad():
            return gate_table(toy(ILFO(levels, gamma=0.01, steps=60, lr=0.05)(toy, small, ledger=LEDGER).images).gates).score.mean(0)

    # The first unit alone is to go all the way up; it cost the most to say so.
    assert scores([0.99, 0.5, 0.5, 0.5, 0.5])[0] > scores([0.5] * 5)[0] + 0.02
    with pytest.raises(ValueError, match="thresholds holds 4 values for a network of 5 units; give one per unit"):
        ILFO([0.5] * 4)(toy, small, ledger=LEDGER)


def test_gradauto_is_eq_6_masked_and_of_length_1() -> None:
    attack = GradAuto(0.5, steps=7)
    same = EnergyAttack(ComplexityLoss(), UnitLength(ConflictMasking()), gamma=2.0, steps=7, warmup=0.0, name="GradAuto")
    assert attack.settings == same.settings
    for strength in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="strength must be positive, got"):
            GradAuto(strength)


# ---- keeping the prediction ----


def test_the_distance_of_the_logits_is_one_more_term_of_the_loss(toy: Logistic, small: Tensor) -> None:
    """Against one loss, differentiated by autograd as a whole, through the space as well."""
    attack = EnergyAttack(PowerLoss(), ComplexityOnly(), gamma=0.7, steps=8, warmup=0.0, lr=0.03, prediction_weight=0.05)
    found = attack(toy, small, ledger=LEDGER).images
    start, delta = torch.atanh(2 * small.clamp(1e-4, 1 - 1e-4) - 1), torch.zeros_like(small, requires_grad=True)
    adam, clean = torch.optim.Adam([delta], 0.03), toy(small).logits.detach()
    for _ in range(8):
        x = (torch.tanh(start + delta) + 1) / 2
        output = toy(x)
        power = -(torch.tensor(LAMBDA) * gate_table(output.gates).score.clamp(max=0.5) ** 4).sum(1)
        total = power + 0.7 * (x - small).square().mean((1, 2, 3)) + 0.05 * (output.logits - clean).square().sum(1)
        adam.zero_grad()
        total.sum().backward()
        adam.step()
    torch.testing.assert_close(found, (torch.tanh(start + delta.detach()) + 1) / 2, rtol=0, atol=2e-5)


def test_the_heavier_the_prediction_the_closer_the_logits(toy: Logistic, small: Tensor) -> None:
    def distance(prediction_weight: float) -> float:
        found = GradMDM(gamma=0.01, steps=40, lr=0.05, prediction_weight=prediction_weight)(toy, small, ledger=LEDGER).images
        with torch.no_grad():
            return (toy(found).logits - toy(small).logits).square().sum(1).mean().item()

    distances = [distance(weight) for weight in (0.0, 0.01, 1.0)]
    assert distances == sorted(distances, reverse=True)
    assert distances[2] < 0.3 * distances[0]


# ---- a second aim ----

LABELS = torch.arange(24) % 4


@pytest.mark.parametrize("weight", [0.7, -1.5])
def test_the_second_aim_weighs_in_lengths_of_the_first(weight: float, toy: Logistic, small: Tensor) -> None:
    """The first step against gradients that autograd takes one by one; Adam's first step is the sign of the sum."""
    attack = EnergyAttack(
        PowerLoss(), ComplexityOnly(), space=ProjectionSpace(), gamma=0.0, steps=1, warmup=0.0, lr=0.01, cross_entropy_weight=weight
    )
    found = attack(toy, small, LABELS, ledger=LEDGER).images
    told = 0
    for index, image in enumerate(small):
        pixels = image[None].clone().requires_grad_()
        output = toy(pixels)
        power = -(torch.tensor(LAMBDA) * gate_table(output.gates).score.clamp(max=0.5) ** 4).sum()
        gates, prediction = (
            torch.autograd.grad(loss, pixels, retain_graph=True)[0].double() for loss in (power, -output.logits.log_softmax(1)[0, LABELS[index]])
        )
        step = gates + weight * gates.norm() / prediction.norm() * prediction
        sure = step.abs() > 1e-3 * gates.abs().max()
        wanted = (image - 0.01 * step.sign().float()).clamp(0, 1)
        torch.testing.assert_close(found[index][sure[0]], wanted[0][sure[0]], rtol=0, atol=1e-5)
        told += int((step.sign() != gates.sign()).sum())
    assert told > 20


def test_each_image_has_an_aim_of_its_own(toy: Logistic, small: Tensor) -> None:
    attack = EnergyAttack(HingeLoss(), ComplexityOnly(), space=LinfBall(0.2), gamma=0.0, steps=10, warmup=0.0, lr=0.03)
    aims = torch.tensor([0.0, 1.0, -1.0] * 8)
    together = attack.aimed(aims)(toy, small, LABELS, ledger=LEDGER).images
    for index in range(len(small)):
        alone = attack.aimed(aims[index : index + 1])(toy, small[index : index + 1], LABELS[index : index + 1], ledger=LEDGER)
        torch.testing.assert_close(alone.images[0], together[index], rtol=0, atol=1e-5)
    plain = attack(toy, small, LABELS, ledger=LEDGER).images
    assert torch.equal(plain[aims == 0], together[aims == 0])
    assert torch.equal(plain, attack.aimed(torch.zeros(24))(toy, small, LABELS, ledger=LEDGER).images)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(toy(images).logits, LABELS, reduction="none") for images in (together, plain)]
    assert losses[0][aims > 0].mean() < losses[1][aims > 0].mean() - 0.01
    assert losses[0][aims < 0].mean() > losses[1][aims < 0].mean() + 0.01
    # The attack that was given keeps its own.
    assert attack.cross_entropy_weight == 0
    assert json.loads(json.dumps(attack.aimed(aims[:3]).settings))["cross_entropy_weight"] == [0.0, 1.0, -1.0]


def test_a_second_aim_needs_labels(toy: Logistic, small: Tensor) -> None:
    with pytest.raises(ValueError, match="EnergyAttack has the cross entropy of the true classes for a second aim: give labels"):
        EnergyAttack(steps=1, cross_entropy_weight=1.0)(toy, small, ledger=LEDGER)


# ---- images never interact ----


@pytest.mark.parametrize("space", [TanhSpace(), LinfBall(0.05)], ids=["tanh", "ball"])
def test_a_batch_is_attacked_as_its_images_one_by_one(space: Space, network: SkipNet, images: Tensor) -> None:
    attack, ledger = GradMDM(gamma=1.0, steps=6, lr=0.02, space=space, keep="best"), price(network, images[:1])
    together = attack(network, images, ledger=ledger)
    for index, image in enumerate(images):
        alone = attack(network, image[None], ledger=ledger)
        torch.testing.assert_close(alone.images[0], together.images[index], rtol=0, atol=1e-5)
        assert alone.step[0] == together.step[index]


def test_the_order_of_a_batch_does_not_matter(toy: Logistic, small: Tensor) -> None:
    attack = GradMDM(gamma=1.0, steps=12, lr=0.05)
    forwards, backwards = attack(toy, small, ledger=LEDGER), attack(toy, small.flip(0), ledger=LEDGER)
    torch.testing.assert_close(backwards.images.flip(0), forwards.images, rtol=0, atol=1e-6)


def test_an_attack_repeats_whatever_the_random_state(network: SkipNet, images: Tensor) -> None:
    attack = GradMDM(steps=4)
    first = attack(network, images)
    torch.manual_seed(99)
    assert torch.equal(attack(network, images).images, first.images)


def test_the_ledger_is_measured_on_the_spot_when_left_out(network: SkipNet, images: Tensor) -> None:
    attack = GradMDM(steps=3)
    assert torch.equal(attack(network, images).images, attack(network, images, ledger=price(network, images[:1])).images)


# ---- what is returned ----


def test_an_attack_recovers_flops(images: Tensor) -> None:
    torch.manual_seed(1)
    network = SkipNet(14, width=4).eval()
    ledger = price(network, images[:1])
    with torch.no_grad():
        clean = ledger(network(images).gates)
        adversarial = ledger(network(GradMDM(gamma=0.0, steps=30, lr=0.1)(network, images, ledger=ledger).images).gates)
    assert clean.sum() < 0.9 * ledger.dense * len(images)
    assert adversarial.sum() - clean.sum() > 0.3 * (ledger.dense * len(images) - clean.sum())


@pytest.mark.parametrize("space", [TanhSpace(), ProjectionSpace(), LinfBall(4 / 255)], ids=["tanh", "projection", "ball"])
@pytest.mark.parametrize("keep", ["last", "best"])
def test_adversarial_images_are_images(space: Space, keep: Any, network: SkipNet, images: Tensor) -> None:
    images[0], images[1] = 0.0, 1.0
    found = GradMDM(gamma=0.0, steps=5, lr=0.5, space=space, keep=keep)(network, images).images
    assert (found.shape, found.dtype, found.requires_grad) == (images.shape, torch.float32, False)
    assert bool(((found >= 0) & (found <= 1)).all())
    if isinstance(space, LinfBall):
        assert (found - images).abs().max() <= 4 / 255 + 1e-6


def test_half_precision_images_are_attacked_in_float32(toy: Logistic, small: Tensor) -> None:
    attack = GradMDM(steps=4)
    assert torch.equal(attack(toy, small.half(), ledger=LEDGER).images, attack(toy, small.half().float(), ledger=LEDGER).images)


def test_the_best_iterate_is_the_one_of_most_flops_then_of_least_error(toy: Logistic, small: Tensor) -> None:
    trajectory = Trajectory(toy)
    best = GradMDM(gamma=0.5, steps=15, lr=0.08, keep="best")(toy, small, ledger=LEDGER)
    assert len(trajectory.images) == 16
    with torch.no_grad():
        flops = torch.stack([LEDGER(toy(x).gates) for x in trajectory.images[:16]])
    for image in range(len(small)):
        ranked = [(-flops[step, image].item(), (trajectory.images[step][image] - small[image]).square().mean().item(), step) for step in range(16)]
        step = min(ranked)[2]
        assert best.step[image] == step
        assert torch.equal(best.images[image], trajectory.images[step][image])
    assert len(best.step.unique()) > 3


@pytest.mark.parametrize("gamma", [0.0, 10.0, 1e4])
def test_the_best_iterate_never_has_fewer_flops_than_the_last_or_the_clean_image(gamma: float, network: SkipNet, images: Tensor) -> None:
    ledger = price(network, images[:1])
    best, last = (GradMDM(gamma=gamma, steps=8, lr=0.1, keep=keep)(network, images, ledger=ledger) for keep in ("best", "last"))
    with torch.no_grad():
        kept, final, clean = (ledger(network(x).gates) for x in (best.images, last.images, TanhSpace().image(TanhSpace().encode(images), 0 * images)))
    assert bool((kept >= final).all())
    assert bool((kept >= clean).all())
    assert last.step.tolist() == [8] * 7


def test_a_large_gamma_leaves_a_tiny_perturbation(toy: Logistic, small: Tensor) -> None:
    def error(gamma: float) -> float:
        found = GradMDM(gamma=gamma, steps=150, space=ProjectionSpace())(toy, small, ledger=LEDGER).images
        return (found - small).square().mean().item()

    errors = [error(gamma) for gamma in (0.0, 10.0, 1e3, 1e5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 1e-6
    assert errors[0] > 1e-2


# ---- which decisions are attacked ----


@pytest.mark.parametrize("own", ["sampled", "hard"])
def test_another_decision_lets_gradients_through_a_network_that_stops_them(own: Any, images: Tensor) -> None:
    networks: dict[str, SkipNet] = {}
    for decision in (own, "straight_through", "hard"):
        torch.manual_seed(1)
        networks[decision] = SkipNet(14, width=4, decision=decision).eval()
    ledger = price(networks[own], images[:1])

    def attacked(network: SkipNet, decision: Any = None) -> Tensor:
        return GradMDM(gamma=0.0, steps=5, decision=decision)(network, images, ledger=ledger).images

    assert torch.equal(attacked(networks[own], "straight_through"), attacked(networks["straight_through"]))
    # As released: in eval mode a network of sampled decisions decides hard, and nothing flows through them.
    assert torch.equal(attacked(networks[own]), attacked(networks["hard"]))
    assert not torch.equal(attacked(networks[own], "straight_through"), attacked(networks[own]))
