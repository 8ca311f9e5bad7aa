"""How fast every attack is, and how long GradMDM and its authors' released algorithm take to a given recovery, on one network in one run.

    python benchmarks/attacks.py [--checkpoint skipnet-38-cifar10] [--data FOLDER] [--batch 64] [--rounds 3] [--recovery 50]

Images per second of the whole attack with its default number of steps, measured over `--steps` of them and scaled; attacks are timed in turn. The
ratio is the time of one step of one image against one masked forward pass with one input-gradient, folded as the attacks fold it. Noise
and random images say enough about speed; the second table wants a trained network and its images (without --data: noise).

The second table gives the median seconds until the mean recovery of the batch first reaches `--recovery` percent, crafting passes alone, and the
mean squared error at that moment: at equal gamma the two algorithms do not make equally large perturbations.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timing import describe_machine, interleaved
from torch import Tensor

from gatewatt import FlopsLedger, load, price
from gatewatt.attacks import (
    ABLATIONS,
    ILFO,
    Attack,
    AutoEnergy,
    DeepSloth,
    EnergyAttack,
    GradAuto,
    GradMDM,
    GradMDMReleased,
    L2Ball,
    Lattice,
    LatticeBall,
    LinfBall,
    Noise,
    ProjectedAttack,
    SquareSearch,
    TanhSpace,
    UniversalAttack,
    ablation,
    under_attack,
)
from gatewatt.data import FolderData
from gatewatt.gating import DynamicNetwork, DynamicOutput, gate_table
from gatewatt.metrics import mse_levels2
from gatewatt.networks import SkipNet


class Timed(NamedTuple):
    """An attack by its number of steps, the steps it takes by default, and whether the network has exits to attack."""

    make: Callable[[int], Attack]
    default: int
    exits: bool = False


ATTACKS: dict[str, Timed] = {
    "GradMDM": Timed(lambda steps: GradMDM(steps=steps), 100),
    "GradMDM, prediction kept": Timed(lambda steps: GradMDM(steps=steps, prediction_weight=0.01), 100),
    "GradMDM, best iterate": Timed(lambda steps: GradMDM(steps=steps, keep="best"), 100),
    "GradMDM, 8-bit": Timed(lambda steps: GradMDM(steps=steps, space=Lattice(TanhSpace())), 100),
    "GradMDMReleased": Timed(lambda steps: GradMDMReleased(steps=steps), 100),
    **{name: Timed(lambda steps, name=name: ablation(name, steps=steps), 100) for name in ABLATIONS},  # type: ignore[misc]
    "ILFO": Timed(lambda steps: ILFO(steps=steps), 300),
    "GradAuto": Timed(lambda steps: GradAuto(steps=steps), 300),
    "DeepSloth, L-inf": Timed(lambda steps: DeepSloth("linf", steps=steps), 30, exits=True),
    "DeepSloth, L2": Timed(lambda steps: DeepSloth("l2", steps=steps), 550, exits=True),
    "uniform halting, L-inf": Timed(lambda steps: DeepSloth("linf", target="halting", steps=steps), 30),
    "PGD, L-inf": Timed(lambda steps: ProjectedAttack(steps=steps), 100),
    "PGD, L2": Timed(lambda steps: ProjectedAttack(space=L2Ball(), steps=steps), 100),
    "PGD, L2, 8-bit": Timed(lambda steps: ProjectedAttack(space=LatticeBall(L2Ball()), steps=steps), 100),
    "SquareSearch": Timed(lambda steps: SquareSearch(steps=steps), 200),
    "AutoEnergy, L-inf": Timed(lambda steps: AutoEnergy("linf", steps=steps), 100),
    "Universal, fitting": Timed(lambda steps: UniversalAttack(space=LinfBall(), steps=steps), 200),
    "Noise": Timed(lambda steps: Noise(), 1),
}


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=None, help="default: an untrained SkipNet-38")
    parser.add_argument("--data", default=None, help="folder with test/<class>/<image>; default: noise")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps timed of each attack")
    parser.add_argument("--recovery", type=float, default=50.0, help="percent to be reached")
    parser.add_argument("--gamma", type=float, default=1.0, help="of both, in the second table")
    parser.add_argument("--budget", type=int, default=100, help="steps after which the second table gives up")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = (load(options.checkpoint) if options.checkpoint else SkipNet(38)).eval().to(memory_format=torch.channels_last)
    images = pictures(options.data, options.batch).contiguous(memory_format=torch.channels_last)
    ledger = price(network, images[:1])
    name = options.checkpoint or "untrained SkipNet-38"
    source = options.data or "noise"
    print(f"{describe_machine()}; {name}, {len(images)} images ({source}), median of {options.rounds} rounds\n")
    speed(network, images, ledger, options.steps, options.rounds)
    if isinstance(network, SkipNet):
        print()
        race(network, images, ledger, options)


def pictures(folder: str | None, count: int) -> Tensor:
    """The first test images of a folder, or noise of CIFAR-10's size; 8-bit either way."""
    if folder is None:
        return (255 * torch.rand(count, 3, 32, 32)).round() / 255
    data = FolderData(folder, test_images=count, eval_batch_size=count)
    data.setup("test")
    return next(iter(data.test_dataloader())).images


def speed(network: DynamicNetwork, images: Tensor, ledger: FlopsLedger, steps: int, rounds: int) -> None:
    """The first table."""
    with torch.no_grad():
        exits = network(images[:1]).exits is not None

    def yardstick() -> None:
        with under_attack(network):
            for _ in range(steps):
                leaf = images.clone().requires_grad_()
                torch.autograd.grad(gate_table(network(leaf).gates).score.sum(), leaf)

    def run(attack: Attack) -> None:
        if isinstance(attack, UniversalAttack):
            attack.fit(network, [images], ledger=ledger)
        else:
            attack(network, images, ledger=ledger)

    timed = {name: one for name, one in ATTACKS.items() if exits or not one.exits}
    made = {name: one.make(min(steps, one.default)) for name, one in timed.items()}
    cases: dict[str, Callable[[], object]] = {name: lambda attack=attack: run(attack) for name, attack in made.items()}  # type: ignore[misc]
    seconds = interleaved({"yardstick": yardstick, **cases}, rounds=rounds, warmup=1)
    unit = seconds.pop("yardstick") / steps
    print(f"one forward pass and one input-gradient: {len(images) / unit:.1f} images per second\n")
    print(f"{'attack':26} {'steps':>6} {'images per second':>18} {'ratio of a step':>16}")
    for name, spent in seconds.items():
        step = spent / min(steps, timed[name].default)
        print(f"{name:26} {timed[name].default:6d} {len(images) / (step * timed[name].default):18.2f} {step / unit:16.2f}")


def race(network: DynamicNetwork, images: Tensor, ledger: FlopsLedger, options: Any) -> None:
    """The second table."""
    racers: dict[str, EnergyAttack] = {
        "GradMDM": GradMDM(gamma=options.gamma, steps=options.budget),
        "GradMDMReleased": GradMDMReleased(gamma=options.gamma, steps=options.budget),
    }
    # In turn, as the first table.
    runs = [{name: reached(attack, network, images, ledger, options.recovery) for name, attack in racers.items()} for _ in range(options.rounds)]
    print(f"to {options.recovery:g} % recovery at gamma {options.gamma:g}, at most {options.budget} steps")
    print(f"{'algorithm':26} {'seconds':>9} {'step':>6} {'MSE (levels squared)':>22}")
    for name in racers:
        found = [run[name] for run in runs]
        whole = [arrival for arrival in found if arrival is not None]
        if len(whole) < len(found):
            print(f"{name:26} not reached")
            continue
        print(f"{name:26} {statistics.median(arrival[0] for arrival in whole):9.2f} {whole[0][1]:6d} {whole[0][2]:22.3f}")


def reached(attack: Attack, network: DynamicNetwork, images: Tensor, ledger: FlopsLedger, recovery: float) -> tuple[float, int, float] | None:
    """Seconds, steps and mean squared error when the batch's recovery first reaches ``recovery`` percent; None if it never does."""
    with torch.no_grad():
        clean = ledger(network(images).gates).sum()
    goal = clean + recovery / 100 * (ledger.dense * len(images) - clean)
    passes, arrival = 0, None

    def watch(module: object, inputs: tuple[Any, ...], output: DynamicOutput) -> None:
        nonlocal passes, arrival
        if arrival is None and float(ledger(output.gates).sum()) >= goal:
            arrival = (time.perf_counter() - start, passes, float(mse_levels2(images, inputs[0].detach()).mean()))
        passes += 1

    handle = network.register_forward_hook(watch)
    start = time.perf_counter()
    try:
        attack(network, images, ledger=ledger)
    finally:
        handle.remove()
    return arrival


if __name__ == "__main__":
    main()
