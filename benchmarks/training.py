"""What energy-adversarial training costs beside clean training, and with --measure what the robustness is that each buys.

    python benchmarks/training.py [--data noise] [--network network/skipnet-38] [--batch 128] [--steps 4] [--rounds 3] [--bf16]
    python benchmarks/training.py --data digits --network network/skipnet-20-small --batch 32 --steps 36
    python benchmarks/training.py --data FOLDER --checkpoint skipnet-38-cifar10 --measure 200 --train 100

Every case is a shipped fragment on top of task/defend, trained by the task itself: an epoch of --steps steps that is not counted (it fills the
cache), then one that is, loading and optimiser included. Cases take turns, and a ratio is the median over rounds of the case's time by that of the
clean epoch of the same round. Energy-adversarial training with a warm-started attack must stay at or below 3.5.

--measure trains every case for --train steps from the same weights, clean training included, and attacks that many test images in an L-inf ball of
4/255. FOLDER holds {train,test}/<class>/* of CIFAR-10; noise is random images of its size, enough for costs.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from timing import describe_machine

from gatewatt.attacks import LinfBall, ProjectedAttack
from gatewatt.cli.quiet import quiet
from gatewatt.data import Augmentation, DigitsData, FolderData, ImageData, MemoryImages
from gatewatt.metrics import bootstrap_interval, recovery_percent
from gatewatt.metrics.record import columns_of
from gatewatt.recipes import load_recipes
from gatewatt.tasks import DynamicTraining, EnergyAttackEvaluation

CASES: dict[str, tuple[str, ...]] = {
    "clean": ("task/train",),
    "uncached, 5 steps": ("task/defend", "defense/uncached"),
    "cached, 2 steps": ("task/defend", "defense/cached"),
    "gap, 2 steps": ("task/defend", "defense/gap"),
    "GradMDM, 3 steps": ("task/defend", "defense/gradmdm"),
    "accuracy, 3 steps": ("task/defend", "defense/accuracy"),
}
"""What is trained -> the fragments that say how; the first is the yardstick."""


class NoiseData(ImageData):
    """Random images of CIFAR-10's size, in its ten classes.

    Args:
        images: training images; a quarter as many test images.
        batch_size: images per training batch.
    """

    def __init__(self, images: int, batch_size: int) -> None:
        plain = {"eval_batch_size": batch_size, "workers": 0, "seed": 0, "split_seed": 0, "val_images": 0, "val_subset": None, "test_images": None}
        super().__init__(name="noise", size=32, batch_size=batch_size, **plain)
        self.images, self.augmentation = images, Augmentation()

    @property
    def num_classes(self) -> int:
        """Ten."""
        return 10

    def source(self, split: str) -> MemoryImages | None:  # type: ignore[override]
        """Drawn once from a seed of the split's own."""
        if split == "val":
            return None
        count, source = self.images // (4 if split == "test" else 1), torch.Generator().manual_seed(len(split))
        pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=source)
        return MemoryImages(pixels, torch.randint(0, 10, (count,), generator=source))


class Stopwatch(L.Callback):
    """Seconds of the last epoch of training, from its first batch's loading to its last step.

    Args:
        clock: tells the seconds.
    """

    seconds = 0.0

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew."""
        self.start = self.now()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop."""
        self.seconds = self.now() - self.start

    def now(self) -> float:
        """Seconds, once the accelerator has caught up."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()


def built(described: Any) -> Any:
    """The object that a recipe describes by ``class_path`` and ``init_args``; plain values as they are."""
    if isinstance(described, Mapping):
        if "class_path" not in described:
            return {key: built(value) for key, value in described.items()}
        module, _, name = described["class_path"].rpartition(".")
        return getattr(import_module(module), name)(**built(described.get("init_args", {})))
    return [built(value) for value in described] if isinstance(described, Sequence) and not isinstance(described, str) else described


def task_of(fragments: Sequence[str], network: str, checkpoint: str | None) -> DynamicTraining:
    """A training task as these fragments have it, with the same first weights for all."""
    torch.manual_seed(0)
    settings = load_recipes([*fragments, network]).settings["model"]
    task: DynamicTraining = built({**settings, "init_args": {**settings["init_args"], "checkpoint": checkpoint}})
    return task


def data_of(name: str, batch: int, steps: int) -> ImageData:
    """``digits``, ``noise``, or the folder of CIFAR-10 of that name."""
    if name == "noise":
        return NoiseData(batch * steps, batch)
    return DigitsData(batch_size=batch) if name == "digits" else FolderData(name, name="cifar10", batch_size=batch)


def trainer(folder: str, **settings: Any) -> L.Trainer:
    """A trainer that shows and writes nothing."""
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = {"devices": 1, "limit_val_batches": 0, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return L.Trainer(default_root_dir=folder, **silent, **plain, **settings)


def costs(cases: Mapping[str, tuple[str, ...]], data: ImageData, options: argparse.Namespace, folder: str) -> dict[str, list[float]]:
    """Seconds of the counted epoch, round by round."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(options.rounds):
        for name, fragments in cases.items():
            watch = Stopwatch(time.process_time if options.cpu_time else time.perf_counter)
            run = trainer(folder, max_epochs=2, limit_train_batches=options.steps, callbacks=[watch], precision=options.precision)
            run.fit(task_of(fragments, options.network, options.checkpoint), data)
            seconds[name].append(watch.seconds)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median over rounds of each case's time by that of the first case in the same round."""
    yardstick = next(iter(seconds.values()))
    return {name: statistics.median(own / clean for own, clean in zip(times, yardstick, strict=True)) for name, times in seconds.items()}


def bought(fragments: Sequence[str], data: ImageData, options: argparse.Namespace, folder: str) -> list[str]:
    """Train --train steps, then attack: accuracy clean and attacked, clean FLOPs, recovery and its interval."""
    task = task_of(fragments, options.network, options.checkpoint)
    if options.train:
        L.seed_everything(0, verbose=False)
        trainer(folder, max_steps=options.train, max_epochs=-1, precision=options.precision).fit(task, data)
    attack = ProjectedAttack(space=LinfBall(4 / 255), steps=options.attack_steps)
    evaluation = EnergyAttackEvaluation(task.network, attack)
    data.test_images = options.measure
    trainer(folder).test(evaluation, data, verbose=False)
    rows = evaluation.rows
    dense, clean, adversarial = columns_of(rows, "flops_dense", "flops_clean", "flops_adversarial")
    low, high = bootstrap_interval(clean, adversarial, dense)
    right, still = (sum(getattr(row, f"prediction_{which}") == row.label for row in rows) / len(rows) for which in ("clean", "adversarial"))
    return [
        f"{100 * right:.1f} %",
        f"{100 * clean.mean() / dense.mean():.1f} %",
        f"{100 * adversarial.mean() / dense.mean():.1f} %",
        f"{recovery_percent(clean, adversarial, dense):.1f} % [{low:.1f}, {high:.1f}]",
        f"{100 * still:.1f} %",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time, measure if asked to, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="noise", help="noise, digits, or a folder of CIFAR-10")
    parser.add_argument("--network", default="network/skipnet-38", help="a fragment")
    parser.add_argument("--checkpoint", default=None, help="weights to start from; default: untrained")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="besides clean training")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="0: do not time")
    parser.add_argument("--cpu-time", action="store_true", help="count the seconds of this process alone, where others compute too")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--measure", type=int, default=0, help="test images to attack after training")
    parser.add_argument("--train", type=int, default=100, help="steps of training before --measure")
    parser.add_argument("--attack-steps", type=int, default=40)
    options = parser.parse_args(arguments)
    options.precision = "bf16-mixed" if options.bf16 else "32-true"
    quiet()
    # Epochs are short on purpose.
    warnings.filterwarnings("ignore", ".*smaller than the logging interval.*")
    cases = {name: CASES[name] for name in dict.fromkeys(["clean", *options.cases])}
    data = data_of(options.data, options.batch, options.steps)
    print(f"{describe_machine()}; {Path(options.network).name}, batch {options.batch} of {Path(options.data).name}, {options.precision}")
    with TemporaryDirectory() as folder:
        if options.rounds:
            seconds = costs(cases, data, options, folder)
            print(f"\n{'training':20} {'ms a step':>10} {'of clean':>9}   {options.steps} steps, median of {options.rounds} rounds")
            for name, ratio in ratios(seconds).items():
                print(f"{name:20} {1e3 * statistics.median(seconds[name]) / options.steps:10.1f} {ratio:9.2f}")
        if options.measure:
            start = options.checkpoint or "untrained weights"
            print(f"\n{options.train} steps from {start}; {options.measure} test images, L-inf 4/255, {options.attack_steps} steps")
            print(f"{'training':20} {'accuracy':>9} {'FLOPs':>9} {'attacked':>9} {'recovery':>24} {'accuracy attacked':>18}")
            for name, fragments in cases.items():
                accuracy, spent, attacked, recovery, still = bought(fragments, data, options, folder)
                print(f"{name:20} {accuracy:>9} {spent:>9} {attacked:>9} {recovery:>24} {still:>18}", flush=True)


if __name__ == "__main__":
    # Each of the many short fits would introduce itself.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    main()
