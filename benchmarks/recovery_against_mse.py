"""GradMDM and its ablations on one checkpoint, each over a range of gamma, so that they can be compared at matched squared error.

    python benchmarks/recovery_against_mse.py --data FOLDER [--images 1000] [--steps 100] [--out benchmarks/results/recovery-mse]
    gatewatt report benchmarks/results/recovery-mse -o benchmarks/results

Every run leaves summary.json and records.csv in a folder of its own; a run whose summary is there already is not repeated, so an interrupted
sweep goes on where it stopped. It is what `gatewatt test -c recipes/attack-skipnet-38-cifar10.yaml` does, for many attacks in one process.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from attack_run import emptied, run_attack

from gatewatt import load
from gatewatt.attacks import EnergyAttack, GradMDM, ablation
from gatewatt.data import FolderData

# The power loss has a smaller slope than Eqs. 5 and 6 at the same gamma, so its range lies lower; what counts is that the errors overlap.
GAMMAS = {
    "Eq5": (10000.0, 3000.0, 1000.0, 300.0, 100.0),
    "Eq6": (3000.0, 1000.0, 300.0, 100.0, 30.0),
    "CGM": (3000.0, 1000.0, 300.0, 100.0, 30.0),
    "Power": (1000.0, 300.0, 100.0, 30.0, 10.0),
    "GradMDM": (1000.0, 300.0, 100.0, 30.0, 10.0),
}


def make(name: str, gamma: float, steps: int) -> EnergyAttack:
    """The attack of that name."""
    return GradMDM(gamma=gamma, steps=steps) if name == "GradMDM" else ablation(name, gamma=gamma, steps=steps)


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with test/<class>/*")
    parser.add_argument("--checkpoint", default="skipnet-38-cifar10")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery-mse"))
    parser.add_argument("--methods", nargs="+", default=list(GAMMAS), choices=list(GAMMAS))
    parser.add_argument("--precision", default="bf16-mixed", help="of crafting; figures are taken in float32 in any case")
    options = parser.parse_args()
    # Advice for training runs, and about workers that data in memory does not need.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    data = FolderData(options.data, name="cifar10", test_images=options.images, eval_batch_size=125)
    network = load(options.checkpoint)
    # Round by round, so that an interruption leaves every method with as many gammas.
    for turn in range(max(map(len, GAMMAS.values()))):
        for name in options.methods:
            if turn >= len(GAMMAS[name]):
                continue
            gamma = GAMMAS[name][turn]
            folder = options.out / f"{name.lower()}-gamma{gamma:g}"
            if (folder / "summary.json").exists():
                continue
            run_attack(network, options.checkpoint, make(name, gamma, options.steps), data, emptied(folder), options.precision)


if __name__ == "__main__":
    main()
