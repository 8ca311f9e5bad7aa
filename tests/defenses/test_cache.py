"""Perturbations kept from epoch to epoch: where they lie on the original, and what they buy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.zoo import sample, settled
from tests.training import QUIET, skipnet, trainer

from gatewatt.attacks import ComplexityOnly, EnergyAttack, GradMDM, HingeLoss, LinfBall
from gatewatt.data import Augmentation, Batch, DigitsData, MemoryImages
from gatewatt.data.batch import BatchKey
from gatewatt.defenses import Crops, PerturbationCache
from gatewatt.flops import price
from gatewatt.gating import gate_table
from gatewatt.tasks import EnergyAdversarialTraining, Optimization
from gatewatt.tasks.defend import attack_from, crops_of

pytestmark = QUIET


EPS = 8 / 255


def two_steps() -> EnergyAttack:
    """Sign steps: the first ones of Adam."""
    return EnergyAttack(HingeLoss(), ComplexityOnly(), space=LinfBall(EPS), gamma=0.0, steps=2, warmup=0.0, lr=0.5 * EPS)


def whole(count: int) -> Crops:
    nothing = torch.zeros(count, dtype=torch.int64)
    return Crops(nothing, nothing, nothing.bool(), 0)


def levels(count: int, size: int = 8) -> torch.Tensor:
    return torch.randint(-8, 9, (count, 3, size, size)).float() / 255


def test_what_is_kept_is_found_again_by_image() -> None:
    cache, kept = PerturbationCache(restart=0.0), levels(3)
    ids = torch.tensor([7, 2, 5])
    assert torch.equal(cache.start(ids, whole(3), torch.zeros_like(kept)), torch.zeros_like(kept))
    cache.keep(ids, whole(3), kept)
    again = cache.start(torch.tensor([5, 7, 4, 90]), whole(4), torch.zeros(4, 3, 8, 8))
    torch.testing.assert_close(again, torch.stack([kept[2], kept[0], torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)]))
    restored = PerturbationCache(restart=0.0)
    restored.load_state_dict(cache.state_dict())
    nothing = torch.zeros_like(kept)
    assert torch.equal(restored.start(ids, whole(3), nothing), cache.start(ids, whole(3), nothing))
    for epoch, forgotten in ((9, False), (10, True)):
        cache.begin_epoch(epoch)
        assert (cache.start(ids, whole(3), nothing).abs().sum() == 0) == forgotten


def test_what_is_not_known_starts_afresh() -> None:
    cache, kept, fresh = PerturbationCache(restart=0.0), levels(3), torch.full((4, 3, 8, 8), 0.007)
    assert torch.equal(cache.start(torch.arange(4), whole(4), fresh), fresh)
    cache.keep(torch.tensor([3, 0, 1]), whole(3), kept)
    # Image 2 lies between known ones, image 90 beyond them.
    again = cache.start(torch.tensor([0, 2, 90, 3]), whole(4), fresh)
    torch.testing.assert_close(again, torch.stack([kept[1], fresh[1], fresh[2], kept[0]]))
    cold = PerturbationCache(restart=0.5)
    cold.load_state_dict(cache.state_dict())
    some = cold.start(torch.zeros(400, dtype=torch.int64), whole(400), fresh[:1].expand(400, -1, -1, -1))
    restarts = (some == 0.007).flatten(1).all(1)
    assert 0.4 < restarts.float().mean() < 0.6
    torch.testing.assert_close(some[~restarts], kept[1].expand(int((~restarts).sum()), -1, -1, -1))


def test_crops_and_flips_are_undone_on_the_way_in_and_done_on_the_way_out() -> None:
    originals = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    data = DigitsData(seed=3)
    data._splits["train"] = MemoryImages(originals, torch.zeros(6, dtype=torch.int64), Augmentation(2, True))
    ids = torch.tensor([4, 0, 5, 1])
    cache, seen = PerturbationCache(restart=0.0), torch.zeros(6, 3, 8, 8, dtype=torch.bool)
    # A perturbation that is a picture of the image itself: wherever it turns up again, it must lie on the same pixels.
    for epoch in range(3):
        batch = data.split("train")[BatchKey(3, epoch, 2, ids)].images
        crops = crops_of(data, epoch, 2, 4)
        picture = (255 * batch).round() / 2 // 1 / 255
        shown = cache.start(ids, crops, torch.zeros_like(batch))
        known = shown != 0
        assert torch.allclose(shown[known], picture[known], atol=1e-6)
        if epoch:
            assert known.float().mean() > 0.3
        cache.keep(ids, crops, picture)
        assert cache.kept is not None
        inside = cache.kept != 0
        assert torch.equal(cache.kept[inside].int(), originals[: len(cache.kept)][inside].int() // 2)
        assert not bool((seen[: len(cache.kept)] & ~inside).any())
        seen[: len(cache.kept)] = inside


def test_some_images_start_from_nothing() -> None:
    cache, kept = PerturbationCache(restart=0.25), torch.full((400, 3, 2, 2), 4 / 255)
    cache.keep(torch.arange(400), whole(400), kept)
    cold = (cache.start(torch.arange(400), whole(400), torch.zeros_like(kept)).flatten(1) == 0).all(1).float().mean()
    assert 0.15 < cold < 0.35


def test_two_steps_from_the_cache_reach_further_than_two_cold_ones() -> None:
    network, images = settled("skipnet-ffgate1"), sample()
    ledger, ids = price(network, images[:1]), torch.arange(12)
    attack, cache = two_steps(), PerturbationCache(restart=0.0)
    batch, loss = Batch(images, torch.zeros(12, dtype=torch.int64), ids), []
    for _ in range(3):
        adversarial = attack_from(cache.start(ids, whole(12), torch.zeros_like(images)), attack, network, batch, ledger)
        cache.keep(ids, whole(12), adversarial - images)
        assert (adversarial - images).abs().max() <= EPS + 1e-6
        assert 0 <= adversarial.min() <= adversarial.max() <= 1
        with torch.no_grad():
            loss.append(gate_table(network(adversarial).gates).score.mean().item())
    assert loss[2] > loss[0]


def test_training_with_a_cache_fills_it_and_a_checkpoint_holds_it(tmp_path: Path) -> None:
    def task() -> EnergyAdversarialTraining:
        steady = Optimization(lr=0.02, schedule="constant")
        return EnergyAdversarialTraining(skipnet(), two_steps(), optimization=steady, cache=PerturbationCache())

    data = DigitsData(batch_size=16, val_subset=12)
    run, first = trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=0), task()
    run.fit(first, data)
    assert first.cache is not None
    assert first.cache.kept is not None
    met = (first.cache.kept != 0).flatten(1).any(1)
    assert 8 < met.sum() <= 32
    run.save_checkpoint(tmp_path / "half.ckpt")
    second = task()
    trainer(tmp_path, max_epochs=2, limit_train_batches=0, limit_val_batches=0).fit(second, data, ckpt_path=tmp_path / "half.ckpt")
    assert second.cache is not None
    assert torch.equal(second.cache.kept, first.cache.kept)  # type: ignore[arg-type]


def test_what_cannot_be_cached_says_so() -> None:
    with pytest.raises(ValueError, match=r"restart must be in \[0, 1\), a share of the images, got 1"):
        PerturbationCache(restart=1)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        PerturbationCache(epochs=0)
    with pytest.raises(ValueError, match="cache needs an attack within a ball, such as EnergyAttack with space LinfBall, got GradMDM"):
        EnergyAdversarialTraining(skipnet(), GradMDM(steps=1), cache=PerturbationCache())
    with pytest.raises(ValueError, match="cache needs training images in memory"):
        crops_of(None, 0, 0, 4)
