"""Networks that benchmarks set side by side: trained and measured once, each run in a folder of its own, and read back from there."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from attack_run import emptied, run_attack

from gatewatt import price
from gatewatt.attacks import AccuracyPGD, Attack, AutoEnergy, GradMDM, LinfBall
from gatewatt.cli import main as gatewatt
from gatewatt.data import DigitsData, FolderData, ImageData
from gatewatt.defenses import BudgetGuard, bare, restored
from gatewatt.files import write_text
from gatewatt.networks.checkpoint import card_of
from gatewatt.reports.collect import Run, load_run
from gatewatt.reports.tables import Figures, figures_of
from gatewatt.shipped import find_checkpoint

ATTACKS: dict[str, Callable[[int], Attack]] = {
    "linf-4": lambda steps: AutoEnergy("linf", 4 / 255, steps=steps),
    "linf-8": lambda steps: AutoEnergy("linf", 8 / 255, steps=steps),
    "l2-0.5": lambda steps: AutoEnergy("l2", 0.5, steps=steps),
    "l2-1.0": lambda steps: AutoEnergy("l2", 1.0, steps=steps),
    "gradmdm": lambda steps: GradMDM(gamma=100.0, steps=steps),
    "gradmdm-300": lambda steps: GradMDM(gamma=300.0, steps=steps),
    "gradmdm-1000": lambda steps: GradMDM(gamma=1000.0, steps=steps),
    "gradmdm-30000": lambda steps: GradMDM(gamma=30000.0, steps=steps),
    "accuracy-linf-4": lambda steps: AccuracyPGD(space=LinfBall(4 / 255), steps=min(steps, 20)),
}
"""Name -> attack by its number of steps. GradMDM has no radius: of several gammas, what it recovers at equal MSE is read off.

The last is against the prediction: who saves FLOPs must not have paid with accuracy.
"""


class Contestant(NamedTuple):
    """A network to be measured.

    Attributes:
        checkpoint: a shipped name or a file.
        guard: budget of a guard around it, a share of its dense FLOPs; None without.
    """

    checkpoint: str
    guard: float | None = None

    @property
    def folder(self) -> Path:
        """Where its runs lie: what it is called, then the seed that its card names."""
        name = find_checkpoint(self.checkpoint).stem
        return Path(name if self.guard is None else f"{name}+guard") / f"seed{card_of(self.checkpoint).get('seed') or 0}"


def data_of(name: str, images: int) -> ImageData:
    """``digits``, or the folder of CIFAR-10 of that name; the first so many test images of a fixed permutation."""
    if name == "digits":
        return DigitsData(eval_batch_size=100, test_images=images)
    return FolderData(name, name="cifar10", eval_batch_size=125, test_images=images)


def measured(contestant: Contestant, attack: Attack, data: ImageData, folder: Path, precision: str) -> Run:
    """The run of a network under an attack; made unless it is there.

    Raises:
        SystemExit: if the folder holds the run of other weights, images or settings.
    """
    card = card_of(contestant.checkpoint)
    asked = {"sha256": card["sha256"], "guard": contestant.guard, "images": data.test_images, "attack": attack.settings}
    asked = json.loads(json.dumps(asked))
    if (folder / "summary.json").exists():
        found = json.loads((folder / "asked.json").read_text())
        differing = [key for key, value in asked.items() if found[key] != value]
        if differing:
            raise SystemExit(f"{folder} holds a run of another {' and '.join(differing)}; remove it, or choose another --out")
        return load_run(folder)
    emptied(folder)
    network = restored(contestant.checkpoint)
    if contestant.guard is not None:
        network = BudgetGuard(network, contestant.guard, size=data.size)
    # Of the network without its defense: a static one is its own dense network, and shares would not compare.
    asked["flops_dense"] = price(bare(network), torch.zeros(1, 3, data.size, data.size)).dense
    write_text(folder / "asked.json", json.dumps(asked, indent=2) + "\n")
    run_attack(network, contestant.checkpoint, attack, data, folder, precision)
    return load_run(folder)


def trained(recipe: str, seed: int, folder: Path, *flags: str) -> str:
    """The checkpoint of a recipe run with that seed; trained unless it is there."""
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        shutil.rmtree(folder, ignore_errors=True)
        seeds = ["--seed_everything", str(seed), "--data.seed", str(seed), "--run", str(folder)]
        if gatewatt(["fit", "-c", recipe, *seeds, "--trainer.enable_progress_bar", "false", "--trainer.logger", "false", *flags]):
            raise SystemExit(f"{recipe} did not train")
        found = sorted(folder.glob("*.safetensors"))
    return str(found[0])


class Entry(NamedTuple):
    """One run of the table: what it is of, a guard's budget, the dense FLOPs of the network without its defense, its figures, and the run itself."""

    network: str
    seed: str
    attack: str
    guard: float | None
    dense: float
    most: float
    figures: Figures
    run: Run


def entries(out: Path) -> list[Entry]:
    """Every run below ``out``, from its files alone."""
    found = []
    for folder in sorted(path.parent for path in out.glob("*/seed*/*/summary.json")):
        network, seed, attack = folder.relative_to(out).parts
        run, asked = load_run(folder), json.loads((folder / "asked.json").read_text())
        found.append(Entry(network, seed, attack, asked["guard"], asked["flops_dense"], float(run.flops[:, 2].max()), figures_of(run), run))
    return found


def over_seeds(values: Sequence[float], digits: int = 1, unit: str = " %") -> str:
    """One value, or the mean of several and between what they lie.

    Example:
        >>> over_seeds([12.04]), over_seeds([10.0, 20.0]), over_seeds([float("nan")])
        ('12.0 %', '15.0 % (10.0 to 20.0)', '-')
    """
    # Where clean images run everything, nothing can be recovered.
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return "-"
    mean, low, high = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean}{unit} ({low} to {high})" if len(values) > 1 else f"{mean}{unit}"


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first column is text."""
    return [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1), *(f"| {' | '.join(cells)} |" for cells in lines)]
