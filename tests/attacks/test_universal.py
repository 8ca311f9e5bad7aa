"""One perturbation for all images: against a second implementation, on unseen images, and through the evaluation of an attack."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.attacks.test_untouched import state
from tests.toys import LEDGER, Detached, Logistic
from tests.training import QUIET, digits, skipnet, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gatewatt.attacks import Ball, CheapestGateLoss, L2Ball, LinfBall, NoGradientError, Noise, UniversalAttack
from gatewatt.data import Batch
from gatewatt.data.order import BatchKey
from gatewatt.data.splits import subset
from gatewatt.flops import audit
from gatewatt.tasks import EnergyAttackEvaluation

pytestmark = QUIET

BALLS: list[Ball] = [LinfBall(0.1), L2Ball(0.4)]
LAMBDA = 5 * torch.tensor([36.0] * 3 + [12.0] * 2, dtype=torch.float64) / 132


@pytest.fixture
def toy() -> Logistic:
    return Logistic().eval()


@pytest.fixture
def small() -> Tensor:
    drawn = torch.rand(40, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    drawn[0], drawn[1] = 0.0, 1.0
    return drawn


def by_hand(network: Logistic, batches: list[Tensor], ball: Ball, steps: int, first: float, momentum: float) -> Tensor:
    """The perturbation (12,), by autograd past the clipping, in float64."""
    weight, bias = network.weight.detach().double(), network.bias.detach().double()
    delta, direction = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for step in range(steps):
        delta.requires_grad_()
        moved = batches[step % len(batches)].double().flatten(1) + delta
        # A pixel that is just black or white still moves.
        pixels = torch.where((moved >= 0) & (moved <= 1), moved, moved.detach().clamp(0, 1))
        logits = (pixels - 0.5) @ weight.T + bias
        (gradient,) = torch.autograd.grad((LAMBDA * (0.1 - logits).clamp(min=0)).sum(), delta)
        direction = momentum * direction + gradient / gradient.norm()
        size = first * ball.eps * (1 - step / steps)
        steepest = direction.sign() if isinstance(ball, LinfBall) else direction / direction.norm()
        delta = delta.detach() - size * steepest
        delta = delta.clamp(-ball.eps, ball.eps) if isinstance(ball, LinfBall) else delta * min(1.0, ball.eps / float(delta.norm()))
    return delta


@pytest.mark.parametrize("ball", BALLS, ids=["linf", "l2"])
def test_the_perturbation_is_that_of_a_second_implementation(ball: Ball, toy: Logistic, small: Tensor) -> None:
    batches = [small[:16], small[16:32], small[32:37]]
    attack = UniversalAttack(space=ball, images=37, steps=8, step_size=0.3, momentum=0.6).fit(toy, batches, ledger=LEDGER)
    assert attack.perturbation is not None
    expected = by_hand(toy, batches, ball, 8, 0.3, 0.6)
    torch.testing.assert_close(attack.perturbation.flatten().double(), expected, rtol=0, atol=1e-5)
    # As many images as asked for, and no more; a loader is not read on.
    again = UniversalAttack(space=ball, images=37, steps=8, step_size=0.3, momentum=0.6)
    assert torch.equal(again.fit(toy, iter([*batches[:2], small[32:]]), ledger=LEDGER).perturbation, attack.perturbation)  # type: ignore[arg-type]


@pytest.mark.parametrize("ball", BALLS, ids=["linf", "l2"])
def test_one_perturbation_is_added_to_every_image_and_clipped(ball: Ball, toy: Logistic, small: Tensor) -> None:
    attack = UniversalAttack(space=ball, steps=20).fit(toy, small[:20].split(7), ledger=LEDGER)
    found = attack(toy, small, ledger=LEDGER)
    assert attack.perturbation is not None
    torch.testing.assert_close(found.images, (small + attack.perturbation).clamp(0, 1), rtol=0, atol=1e-7)
    assert found.step.tolist() == [20] * 40
    norm = float(attack.perturbation.abs().max()) if isinstance(ball, LinfBall) else float(attack.perturbation.norm())
    assert norm <= ball.eps + 1e-6
    for index in (0, 1, 17):
        assert torch.equal(attack(toy, small[index : index + 1], ledger=LEDGER).images[0], found.images[index])


@pytest.mark.parametrize("ball", BALLS, ids=["linf", "l2"])
def test_unseen_images_spend_more_than_under_noise_of_the_same_size(ball: Ball, toy: Logistic, small: Tensor) -> None:
    def spent(images: Tensor) -> float:
        with torch.no_grad():
            return float(LEDGER(toy(images).gates).mean())

    seen, unseen = small[:20], small[20:]
    attack = UniversalAttack(space=ball, steps=60).fit(toy, [seen], ledger=LEDGER)
    assert spent(attack(toy, unseen, ledger=LEDGER).images) > spent(Noise(space=ball)(toy, unseen, ledger=LEDGER).images) + 5
    assert spent(attack(toy, unseen, ledger=LEDGER).images) > spent(unseen) + 5


def test_the_network_and_the_random_state_are_as_they_were(toy: Logistic, small: Tensor) -> None:
    toy.train()
    before = state(toy)
    first = UniversalAttack(CheapestGateLoss(), steps=3).fit(toy, [small]).perturbation
    assert state(toy) == before
    with torch.inference_mode():
        second = UniversalAttack(CheapestGateLoss(), steps=3).fit(toy, [small]).perturbation
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_what_is_missing_is_said(toy: Logistic, small: Tensor) -> None:
    with pytest.raises(ValueError, match=r"Universal has no perturbation yet: call fit\(network, batches of images\) first"):
        UniversalAttack()(toy, small, ledger=LEDGER)
    with pytest.raises(ValueError, match="needs images to be fitted to, got none"):
        UniversalAttack().fit(toy, [])
    with pytest.raises(ValueError, match=r"images must be in \[0, 1\]"):
        UniversalAttack().fit(toy, [3 * small])
    with pytest.raises(NoGradientError, match="there is nothing to follow"):
        UniversalAttack(decision="hard").fit(Detached().eval(), [small], ledger=LEDGER)
    with pytest.raises(ValueError, match=r"was fitted to images of \(3, 2, 2\), these are \(3, 4, 4\)"):
        UniversalAttack(steps=1).fit(toy, [small], ledger=LEDGER)(toy, torch.rand(1, 3, 4, 4), ledger=LEDGER)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": 0}, "images and steps must be at least 1, got 0 and 200"),
        ({"steps": 0}, "images and steps must be at least 1, got 500 and 0"),
        ({"step_size": 0.0}, "step_size must be in"),
        ({"step_size": math.nan}, "step_size must be in"),
        ({"momentum": 1.0}, "momentum in"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UniversalAttack(**settings)


# ---- gatewatt test ----


def test_an_evaluation_fits_it_to_training_images_first(tmp_path: Path) -> None:
    network, data = skipnet().to(memory_format=torch.channels_last), digits()
    attack = UniversalAttack(space=LinfBall(0.2), images=10, steps=4)
    task = EnergyAttackEvaluation(network, attack)
    trainer(tmp_path).test(task, data, verbose=False)
    training = data.split("train").augmented(None)
    chosen = subset(len(training), 10, data.split_seed)
    batches = [training[BatchKey(0, 0, number, part)].images for number, part in enumerate(chosen.split(8))]
    expected = UniversalAttack(space=LinfBall(0.2), images=10, steps=4).fit(
        network, [batch.contiguous(memory_format=torch.channels_last) for batch in batches]
    )
    assert attack.perturbation is not None
    assert expected.perturbation is not None
    torch.testing.assert_close(attack.perturbation, expected.perturbation, rtol=0, atol=1e-6)
    assert len(task.rows) == 12
    assert task.attack_seconds > 0
    for row, (image, _, index) in zip(task.rows, [item for batch in data.test_dataloader() for item in zip(*batch, strict=True)], strict=True):
        assert row.id == int(index)
        assert row.flops_adversarial == audit(network, (image + attack.perturbation[0]).clamp(0, 1)[None])
    # A second test takes the same perturbation.
    fitted = attack.perturbation
    trainer(tmp_path).test(task, data, verbose=False)
    assert attack.perturbation is fitted


def test_an_evaluation_without_a_data_module_says_so(tmp_path: Path) -> None:
    class Plain(Dataset[Batch]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Batch:
            return Batch(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.long), torch.arange(2))

    with pytest.raises(ValueError, match="Universal is fitted to training images: give the trainer a data module of gatewatt.data"):
        trainer(tmp_path).test(EnergyAttackEvaluation(skipnet(), UniversalAttack()), DataLoader(Plain(), batch_size=None), verbose=False)
