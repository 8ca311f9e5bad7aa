"""The attack in the loop: its ramp, what its images are attacked for, where they start, and that progress is not forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from tests.tasks.test_defend import STEADY, States, copied, same
from tests.toys import LEDGER, Logistic
from tests.training import QUIET, digits, skipnet, trainer
from torch import Tensor

from gatewatt.attacks import (
    AccuracyPGD,
    AttackResult,
    ComplexityOnly,
    ConflictMasking,
    EnergyAttack,
    GradMDM,
    HingeLoss,
    L2Ball,
    LatticeBall,
    LinfBall,
    ProjectedAttack,
)
from gatewatt.data import Batch
from gatewatt.data.order import generator
from gatewatt.defenses import PerturbationCache
from gatewatt.flops import FlopsLedger
from gatewatt.gating import DynamicNetwork, gate_table
from gatewatt.objectives import ComputeTarget, EnergyAdversarialObjective
from gatewatt.tasks import EnergyAdversarialTraining
from gatewatt.tasks.defend import AttackMix, attack_from, shrunk

pytestmark = QUIET

EPS = 4 / 255


class Noting(EnergyAttack):
    """Sign steps in the loop, and what they were made of; copies of it write into the same notes."""

    def __init__(self, **settings: Any) -> None:
        space = LinfBall(EPS)
        super().__init__(HingeLoss(), ComplexityOnly(), space=space, gamma=0.0, steps=2, warmup=0.0, lr=0.75 * EPS, **settings)
        self.notes: list[tuple[EnergyAttack, Tensor, Tensor]] = []

    def __call__(self, network: DynamicNetwork, images: Tensor, labels: Tensor | None = None, *, ledger: FlopsLedger | None = None) -> AttackResult:
        result = super().__call__(network, images, labels, ledger=ledger)
        self.notes.append((self, images.clone(), result.images.clone()))
        return result


def gaps(**settings: Any) -> EnergyAdversarialObjective:
    clean = ComputeTarget(0.6, diversity=1.0, spread=0.02)
    weights = {"adversarial_weight": 0.0, "distillation": 0.0, "consistency": 2.0, "gap": 4.0, "gate_gap": 0.5, "saturation": 0.1}
    return EnergyAdversarialObjective(clean, **{**weights, **settings})


class Logged(L.Callback):
    """The terms that were logged up to each step."""

    def __init__(self) -> None:
        self.steps: list[set[str]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: object) -> None:
        self.steps.append({name.removeprefix("train/") for name in trainer.callback_metrics})


# ---- the schedule ----


def test_radius_steps_and_gap_rise_with_the_run(tmp_path: Path) -> None:
    attack, objective, logged = Noting(), gaps(ramp=(0.2, 0.6)), Logged()
    task = EnergyAdversarialTraining(skipnet(), attack, objective, STEADY)
    trainer(tmp_path, max_steps=10, max_epochs=3, limit_val_batches=0, callbacks=[logged]).fit(task, digits())
    # Steps 0 to 2 are clean: at the very beginning of the ramp nothing is due yet.
    shares = [0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [used.space.eps for used, _, _ in attack.notes] == pytest.approx([share * EPS for share in shares])  # type: ignore[attr-defined]
    assert [used.lr for used, _, _ in attack.notes] == pytest.approx([0.75 * share * EPS for share in shares])
    assert [(found - clean).abs().max().item() for _, clean, found in attack.notes] == pytest.approx([share * EPS for share in shares], rel=1e-2)
    assert (attack.space.eps, attack.lr) == (EPS, 0.75 * EPS)  # type: ignore[attr-defined]
    clean = {"cross_entropy", "compute", "diversity"}
    assert [step >= clean for step in logged.steps] == [True] * 10
    assert ["gap" in step for step in logged.steps] == [False] * 3 + [True] * 7


def test_the_parent_is_taken_when_the_ramp_begins(tmp_path: Path) -> None:
    states, attack = States(), Noting()
    task = EnergyAdversarialTraining(skipnet(), attack, gaps(distillation=2.0, ramp=(0.45, 0.7)), STEADY)
    started = copied(task.network)
    trainer(tmp_path, max_epochs=4, limit_train_batches=2, limit_val_batches=0, callbacks=[states]).fit(task, digits())
    # Eight steps; the fifth is the first that is beyond 0.45.
    assert len(attack.notes) == 4
    assert [same(parent, started) for parent in states.parent] == [True, True, False, False]
    assert same(states.parent[2], states.network[1])


@pytest.mark.parametrize(
    "attack",
    [
        ProjectedAttack(space=L2Ball(1.0), steps=2),
        AccuracyPGD(space=LinfBall(EPS), steps=2),
        EnergyAttack(space=LatticeBall(LinfBall(8 / 255)), steps=2),
    ],
    ids=repr,
)
def test_any_attack_in_a_ball_shrinks(attack: Any) -> None:
    assert shrunk(attack, 1.0) is attack
    eps, images = attack.space.eps, (255 * torch.rand(4, 3, 2, 2)).round() / 255
    small = shrunk(attack, 0.25)
    assert small.space.eps == 0.25 * eps  # type: ignore[attr-defined]
    found = small(Logistic().eval(), images, torch.tensor([0, 1, 2, 3]), ledger=LEDGER).images
    length = (found - images).flatten(1).norm(dim=1, p=attack.space.order)
    assert length.max() <= 0.25 * eps + 1e-6
    assert attack.space.eps == eps


# ---- the mix ----


def test_aims_come_in_their_shares_by_image() -> None:
    attack, mix = Noting(), AttackMix(keep=0.3, mislead=0.1, aim=0.7, masking=0.0)
    varied = mix.vary(attack, 4000, 0, generator("mix", 1))
    aims = varied.cross_entropy_weight
    assert isinstance(aims, Tensor)
    assert [round(value, 4) for value in sorted(set(aims.tolist()))] == [-0.7, 0.0, 0.7]
    assert (aims > 0).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (aims < 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(aims, mix.vary(attack, 4000, 0, generator("mix", 1)).cross_entropy_weight)  # type: ignore[arg-type]
    assert not torch.equal(aims, mix.vary(attack, 4000, 0, generator("mix", 2)).cross_entropy_weight)  # type: ignore[arg-type]
    assert attack.cross_entropy_weight == 0
    plain = AttackMix(keep=0.0, mislead=0.0).vary(Noting(cross_entropy_weight=0.4), 3, 0, generator("mix", 1))
    assert plain.cross_entropy_weight == 0.4


@pytest.mark.parametrize(("share", "masked"), [(0.0, []), (0.5, [1, 3, 5, 7]), (0.25, [3, 7]), (1.0, [*range(8)])])
def test_gradient_masking_takes_its_share_of_the_batches_in_turn(share: float, masked: list[int]) -> None:
    mix = AttackMix(masking=share)
    directions = [mix.vary(Noting(), 2, step, generator("mix", step)).direction for step in range(8)]
    assert [step for step, direction in enumerate(directions) if isinstance(direction, ConflictMasking)] == masked
    assert all(isinstance(direction, (ConflictMasking, ComplexityOnly)) for direction in directions)


def test_a_random_start_lies_in_the_ball() -> None:
    images = torch.rand(5, 3, 4, 4)
    start = AttackMix().start(LinfBall(EPS), images, generator("mix", 1))
    assert start.shape == images.shape
    assert 0.9 * EPS < start.abs().max() <= EPS
    assert torch.equal(start, AttackMix().start(LinfBall(EPS), images, generator("mix", 1)))
    assert torch.equal(AttackMix(random_start=False).start(LinfBall(EPS), images, generator("mix", 1)), torch.zeros_like(images))


@pytest.mark.parametrize("cache", [None, PerturbationCache()], ids=["uncached", "cached"])
def test_attacks_of_a_batch_start_at_random_points_and_stay_in_the_ball(cache: PerturbationCache | None, tmp_path: Path) -> None:
    attack = Noting()
    task = EnergyAdversarialTraining(skipnet(), attack, gaps(), STEADY, cache=cache, mix=AttackMix())
    crafted: list[tuple[Tensor, Tensor]] = []
    own = task.attacked

    def watched(batch: Batch, batch_idx: int) -> Tensor:
        crafted.append((batch.images, own(batch, batch_idx)))
        return crafted[-1][1]

    task.attacked = watched  # type: ignore[method-assign]
    run = trainer(tmp_path, limit_train_batches=2, limit_val_batches=0)
    run.fit(task, digits())
    assert len(crafted) == 2
    for (clean, adversarial), (used, begun, _) in zip(crafted, attack.notes, strict=True):
        assert (begun - clean).abs().max().item() == pytest.approx(EPS, rel=0.05)
        assert (adversarial - clean).abs().max() <= EPS + 1e-6
        assert 0 <= adversarial.min() <= adversarial.max() <= 1
        assert isinstance(used.cross_entropy_weight, Tensor)
        assert len(used.cross_entropy_weight) == 16
    assert [type(used.direction) for used, _, _ in attack.notes] == [ComplexityOnly, ConflictMasking]
    logged = {name.removeprefix("train/") for name in run.callback_metrics}
    assert logged == {"cross_entropy", "compute", "diversity", "consistency", "gap", "gate_gap", "saturation"}


def test_a_mix_leaves_the_random_numbers_of_the_network_alone(tmp_path: Path) -> None:
    class Numbers(L.Callback):
        def on_before_backward(self, *arguments: object) -> None:
            drawn.append(torch.rand(3))

    drawn: list[Tensor] = []
    for mix in (None, AttackMix()):
        task = EnergyAdversarialTraining(skipnet(), Noting(), gaps(), STEADY, mix=mix)
        trainer(tmp_path, limit_train_batches=2, limit_val_batches=0, callbacks=[Numbers()]).fit(task, digits())
    assert torch.equal(torch.stack(drawn[:2]), torch.stack(drawn[2:]))


def test_a_resumed_run_ends_where_the_run_that_was_never_interrupted_ends(tmp_path: Path) -> None:
    def task(seed: int) -> EnergyAdversarialTraining:
        return EnergyAdversarialTraining(
            skipnet(seed), Noting(), gaps(ramp=(0.1, 0.8)), STEADY, cache=PerturbationCache(restart=0.3), mix=AttackMix()
        )

    # The schedule is a share of the whole run, which both must know.
    settings = {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 0}
    whole, broken, resumed = task(1), task(1), task(5)
    trainer(tmp_path, **settings).fit(whole, digits())

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                trainer.should_stop = True

    trainer(tmp_path, callbacks=[Stop()], **settings).fit(broken, digits())
    trainer(tmp_path, **settings).fit(resumed, digits(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert same(copied(resumed.network), copied(whole.network))
    assert not same(copied(broken.network), copied(whole.network))


# ---- progress in the loop ----


def test_the_best_of_few_steps_forgets_what_the_last_one_keeps() -> None:
    """Steps too small to open any gate: by FLOPs no iterate is better than the image, yet every one is nearer to opening a gate."""
    toy, images = Logistic().eval(), 0.5 + 0.02 * torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, torch.zeros(6, dtype=torch.int64), torch.arange(6))

    def closed(adversarial: Tensor) -> float:
        with torch.no_grad():
            return HingeLoss()(gate_table(toy(adversarial).gates), torch.ones(5)).mean().item()

    last = EnergyAttack(HingeLoss(), ComplexityOnly(), space=LinfBall(0.04), gamma=0.0, steps=2, warmup=0.0, lr=0.01)
    for attack, forgets in (
        (ProjectedAttack(HingeLoss(), space=LinfBall(0.04), steps=2), True),
        (ProjectedAttack(HingeLoss(), space=LinfBall(0.04), steps=2, keep="last"), False),
        (last, False),
    ):
        start, losses = torch.zeros_like(images), [closed(images)]
        for _ in range(2):
            found = attack_from(start, attack, toy, batch, LEDGER)
            start = found - images
            losses.append(closed(found))
        stayed = (start == 0).flatten(1).all(1)
        assert bool(stayed.any()) == forgets, attack
        if not forgets:
            assert max(losses[1:]) < losses[0]


# ---- what does not fit ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.6, "mislead": 0.6}, "keep and mislead must be shares of the images, together at most 1, got 0.6 and 0.6"),
        ({"keep": -0.1}, "keep and mislead must be shares of the images, together at most 1, got -0.1 and 0.2"),
        ({"aim": 0.0}, "aim must be positive, got 0.0; without further aims set keep and mislead to 0"),
        ({"masking": 1.5}, r"masking must be in \[0, 1\], a share of the batches, got 1.5"),
    ],
)
def test_shares_out_of_range_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttackMix(**settings)  # type: ignore[arg-type]


def test_an_attack_that_does_not_fit_is_refused() -> None:
    ball = "needs an attack within a ball, such as EnergyAttack with space LinfBall, got"
    with pytest.raises(ValueError, match=f"ramp {ball} GradMDM"):
        EnergyAdversarialTraining(skipnet(), GradMDM(steps=1), gaps(ramp=(0.1, 0.2)))
    with pytest.raises(ValueError, match=f"mix {ball} AccuracyPGD"):
        EnergyAdversarialTraining(skipnet(), AccuracyPGD(), mix=AttackMix())
    last = "needs an attack that returns its last iterate, and"
    with pytest.raises(ValueError, match=f"cache {last} ProjectedAttack returns the best by FLOPs; set keep to last"):
        EnergyAdversarialTraining(skipnet(), ProjectedAttack(), cache=PerturbationCache())
    with pytest.raises(ValueError, match=f"mix {last} Noting"):
        EnergyAdversarialTraining(skipnet(), Noting(keep="best"), mix=AttackMix())
    EnergyAdversarialTraining(skipnet(), ProjectedAttack(keep="last"), gaps(ramp=(0.1, 0.2)), cache=PerturbationCache())
