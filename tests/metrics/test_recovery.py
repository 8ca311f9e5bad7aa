"""Recovery against plain formulas, and the metric against the formulas, in one process and in two."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gatewatt.metrics import MeanFlops, RecoveryPercent, bootstrap_interval, recovery_per_image_percent, recovery_percent
from gatewatt.metrics.estimates import bootstrap_sums

DENSE = 250_000_001.0  # odd and above 2**24, so float32 would show


@st.composite
def flops(draw):
    """Clean and adversarial FLOPs of a few images below DENSE."""
    images = draw(st.integers(1, 12))
    counts = st.lists(st.integers(0, int(DENSE)), min_size=images, max_size=images)
    return np.array(draw(counts), dtype=np.float64), np.array(draw(counts), dtype=np.float64)


def sample(images: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    clean = generator.integers(int(0.3 * DENSE), int(0.9 * DENSE), images).astype(float)
    clean[::7] = DENSE
    adversarial = np.minimum(clean + generator.integers(-10_000_000, 80_000_000, images), DENSE)
    return clean, adversarial


def test_no_change_recovers_nothing_and_opening_everything_recovers_all():
    clean, _ = sample()
    assert recovery_percent(clean, clean, DENSE) == 0
    assert recovery_per_image_percent(clean, clean, DENSE).percent == 0
    assert recovery_percent(clean, np.full_like(clean, DENSE), DENSE) == 100
    assert recovery_per_image_percent(clean, np.full_like(clean, DENSE), DENSE).percent == pytest.approx(100)


@settings(deadline=None)
@given(flops())
def test_both_definitions_equal_a_loop(columns):
    clean, adversarial = columns
    below = [(c, a) for c, a in zip(clean, adversarial, strict=True) if DENSE - c > 1e-9 * DENSE]
    per_image = recovery_per_image_percent(clean, adversarial, DENSE)
    assert per_image.left_out == len(clean) - len(below)
    if not below:
        assert math.isnan(recovery_percent(clean, adversarial, DENSE))
        assert math.isnan(per_image.percent)
        return
    assert per_image.percent == pytest.approx(sum(100 * (a - c) / (DENSE - c) for c, a in below) / len(below), rel=1e-9, abs=1e-9)
    expected = 100 * (adversarial.sum() - clean.sum()) / (DENSE * len(clean) - clean.sum())
    assert recovery_percent(clean, adversarial, DENSE) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_images_at_full_flops_only_leave_recovery_undefined():
    full = [DENSE, DENSE]
    assert math.isnan(recovery_percent(full, full, DENSE))
    assert math.isnan(bootstrap_interval(full, full, DENSE)[0])
    metric = RecoveryPercent()
    metric.update(torch.tensor(full, dtype=torch.float64), torch.tensor(full, dtype=torch.float64), DENSE)
    assert math.isnan(metric.compute().item())
    assert metric.totals().images_at_full_flops == 2
    assert math.isnan(metric.totals().recovery_per_image_percent)


@pytest.mark.parametrize(
    ("clean", "adversarial", "message"),
    [
        ([1.0, math.nan], [1.0, 1.0], "clean FLOPs .* image 1"),
        ([1.0, 1.0], [math.inf, 1.0], "adversarial FLOPs .* image 0"),
        ([1.0, 1.0], [1.0, 11.0], "at most dense .* image 1"),
        ([-1.0, 1.0], [1.0, 1.0], "0 or more .* image 0"),
        ([1.0], [1.0, 1.0], "one shape"),
    ],
)
def test_values_that_cannot_be_flops_are_refused_and_nothing_is_added(clean, adversarial, message):
    with pytest.raises(ValueError, match=message):
        recovery_percent(clean, adversarial, 10.0)
    metric = RecoveryPercent()
    with pytest.raises(ValueError, match=message):
        metric.update(torch.tensor(clean, dtype=torch.float64), torch.tensor(adversarial, dtype=torch.float64), 10.0)
    assert metric.images == 0
    assert metric.recovered == 0


def test_float32_flops_are_refused():
    with pytest.raises(TypeError, match="float64"):
        RecoveryPercent().update(torch.ones(2), torch.ones(2), 10.0)
    with pytest.raises(TypeError, match="float64"):
        MeanFlops().update(torch.ones(2))


@settings(deadline=None)
@given(flops(), st.integers(1, 5))
def test_the_metric_equals_the_formulas_for_any_batch_size(columns, batch):
    clean, adversarial = columns
    metric, mean = RecoveryPercent(), MeanFlops()
    for start in range(0, len(clean), batch):
        ours, theirs = (torch.from_numpy(values[start : start + batch]) for values in (clean, adversarial))
        metric.update(ours, theirs, DENSE)
        mean.update(theirs)
    expected = recovery_per_image_percent(clean, adversarial, DENSE)
    totals = metric.totals()
    assert metric.compute().item() == pytest.approx(recovery_percent(clean, adversarial, DENSE), rel=1e-12, abs=1e-12, nan_ok=True)
    assert totals.recovery_percent == pytest.approx(metric.compute().item(), nan_ok=True)
    assert totals.recovery_per_image_percent == pytest.approx(expected.percent, rel=1e-9, abs=1e-9, nan_ok=True)
    assert (totals.images, totals.images_at_full_flops) == (len(clean), expected.left_out)
    assert mean.compute().item() == adversarial.mean()


def test_forward_gives_the_batch_and_compute_the_whole_set():
    clean, adversarial = (torch.from_numpy(values) for values in sample())
    metric = RecoveryPercent()
    first = metric(clean[:10], adversarial[:10], torch.full((10,), DENSE, dtype=torch.float64))
    metric(clean[10:], adversarial[10:], DENSE)
    assert first.item() == recovery_percent(clean[:10], adversarial[:10], DENSE)
    assert metric.compute().item() == recovery_percent(clean, adversarial, DENSE)


def test_states_stay_float64_and_int64_in_a_module_cast_to_half():
    module = torch.nn.Module()
    module.metric = RecoveryPercent()
    module.half()
    module.metric.update(torch.tensor([1e9], dtype=torch.float64), torch.tensor([1e9 + 1], dtype=torch.float64), 2e9)
    assert module.metric.recovered.dtype == torch.float64
    assert module.metric.images.dtype == torch.int64
    assert module.metric.recovered.item() == 1


def test_resampled_sums_equal_gathering_the_drawn_images():
    columns = np.random.default_rng(1).integers(0, 1000, (9, 2)).astype(float)
    generator = np.random.default_rng(3)
    expected = [columns[generator.integers(0, 9, 9)].sum(axis=0) for _ in range(20)]
    assert bootstrap_sums(columns, draws=20, seed=3).tolist() == [row.tolist() for row in expected]


def test_the_interval_contains_the_estimate_is_repeatable_and_shrinks_with_more_images():
    few, many = sample(50), sample(5000)
    low, high = bootstrap_interval(*few, DENSE)
    assert low < recovery_percent(*few, DENSE) < high
    assert bootstrap_interval(*few, DENSE) == (low, high)
    assert bootstrap_interval(*few, DENSE, seed=1) != (low, high)
    narrow = bootstrap_interval(*many, DENSE, draws=500)
    assert narrow[1] - narrow[0] == pytest.approx((high - low) / 10, rel=0.5)


def test_the_interval_has_the_width_that_normal_theory_gives():
    # With one saving for all images the ratio is a plain mean, whose standard error is known.
    generator = np.random.default_rng(0)
    clean = np.full(400, 40.0)
    adversarial = 40 + 60 * generator.random(400)
    won = 100 * (adversarial - clean) / 60
    low, high = bootstrap_interval(clean, adversarial, 100.0)
    assert high - low == pytest.approx(2 * 1.96 * won.std() / math.sqrt(400), rel=0.06)


def _on_one_of_two_processes(rank: int, folder: str) -> None:
    import torch.distributed as dist

    from gatewatt.metrics import GateUsage

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        clean, adversarial = (torch.from_numpy(values) for values in sample(25))
        metric, mean, usage = RecoveryPercent(), MeanFlops(), GateUsage(units=3)
        # Uneven shares: 20 images against 5.
        share = slice(0, 20) if rank == 0 else slice(20, 25)
        metric.update(clean[share], adversarial[share], DENSE)
        mean.update(clean[share])
        usage.update((torch.arange(75).reshape(25, 3) % 4 == 0)[share])
        result = (metric.compute(), mean.compute(), usage.compute(), tuple(metric.totals()), metric.images)
        torch.save(result, f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_give_the_digits_of_one(tmp_path):
    torch.multiprocessing.spawn(_on_one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    clean, adversarial = sample(25)
    per_image = recovery_per_image_percent(clean, adversarial, DENSE)
    for rank in range(2):
        recovery, mean, usage, totals, own_images = torch.load(tmp_path / f"rank{rank}.pt")
        assert recovery.item() == recovery_percent(clean, adversarial, DENSE)
        assert mean.item() == clean.mean()
        assert usage.tolist() == (torch.arange(75).reshape(25, 3) % 4 == 0).double().mean(dim=0).tolist()
        assert totals[0] == recovery.item()
        assert totals[1] == pytest.approx(per_image.percent, rel=1e-12)
        assert totals[2:] == (25, per_image.left_out)
        # Reading the totals must not leave the sum of all processes behind in one of them.
        assert own_images.item() == (20, 5)[rank]
