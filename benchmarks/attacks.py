"""How fast every attack is, and how long GradMDM and its authors' released algorithm take to a given recovery, on one network in one run.

    python benchmarks/attacks.py [--checkpoint skipnet-38-cifar10] [--data FOLDER] [--batch 64] [--rounds 3] [--recovery 50]
    python benchmarks/attacks.py --render

Images per second of the whole attack with its default number of steps, measured over `--steps` of them and scaled; attacks are timed in turn. The
ratio is the time of one step of one image against one masked forward pass with one input-gradient, folded as the attacks fold it. PGD, the search
and AutoEnergy drop images that run everything, sooner or later depending on radius and network: for the speed of whole runs, `--steps 100`.
Noise says enough about speed; the second table wants a trained network and its images. FOLDER holds test/<class>/* of CIFAR-10; digits are
embedded, and a network trained on CIFAR-10 is shown noise without it.

The second table, for networks that skip whole blocks, gives the median seconds until the mean recovery of the batch first reaches `--recovery`
percent, crafting passes alone, and the mean squared error at that moment: at equal gamma the two algorithms do not make equally large
perturbations.

Each network leaves <network>.json below --out; ATTACKS.md and attacks.csv are rendered from all of them.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from families import data_of
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
from gatewatt.cli.doctor import pick_batch
from gatewatt.files import write_text
from gatewatt.gating import DynamicNetwork, DynamicOutput, gate_table
from gatewatt.metrics import mse_levels2
from gatewatt.networks import SkipNet


class Timed(NamedTuple):
    """An attack by its number of steps, the steps it takes by default, and what it needs a network to have."""

    make: Callable[[int], Attack]
    default: int
    needs: Literal["exits", "blocks"] | None = None


ATTACKS: dict[str, Timed] = {
    "GradMDM": Timed(lambda steps: GradMDM(steps=steps), 100),
    "GradMDM, prediction kept": Timed(lambda steps: GradMDM(steps=steps, prediction_weight=0.01), 100),
    "GradMDM, best iterate": Timed(lambda steps: GradMDM(steps=steps, keep="best"), 100),
    "GradMDM, 8-bit": Timed(lambda steps: GradMDM(steps=steps, space=Lattice(TanhSpace())), 100),
    "GradMDMReleased": Timed(lambda steps: GradMDMReleased(steps=steps), 100, needs="blocks"),
    **{name: Timed(lambda steps, name=name: ablation(name, steps=steps), 100) for name in ABLATIONS},  # type: ignore[misc]
    "ILFO": Timed(lambda steps: ILFO(steps=steps), 300),
    "GradAuto": Timed(lambda steps: GradAuto(steps=steps), 300),
    "DeepSloth, L-inf": Timed(lambda steps: DeepSloth("linf", steps=steps), 30, needs="exits"),
    "DeepSloth, L2": Timed(lambda steps: DeepSloth("l2", steps=steps), 550, needs="exits"),
    "uniform halting, L-inf": Timed(lambda steps: DeepSloth("linf", target="halting", steps=steps), 30),
    "PGD, L-inf": Timed(lambda steps: ProjectedAttack(steps=steps), 100),
    "PGD, L2": Timed(lambda steps: ProjectedAttack(space=L2Ball(), steps=steps), 100),
    "PGD, L2, 8-bit": Timed(lambda steps: ProjectedAttack(space=LatticeBall(L2Ball()), steps=steps), 100),
    "SquareSearch": Timed(lambda steps: SquareSearch(steps=steps), 200),
    "AutoEnergy, L-inf": Timed(lambda steps: AutoEnergy("linf", steps=steps), 100),
    "AutoEnergy, L2": Timed(lambda steps: AutoEnergy("l2", steps=steps), 100),
    "Universal, fitting": Timed(lambda steps: UniversalAttack(space=LinfBall(), steps=steps), 200),
    "Noise": Timed(lambda steps: Noise(), 1),
}


def main() -> None:
    """Time, write and render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=None, help="default: an untrained SkipNet-38")
    parser.add_argument("--data", default=None, help="folder with test/<class>/<image>, for a network trained on CIFAR-10; default: noise")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps timed of each attack")
    parser.add_argument("--recovery", type=float, default=50.0, help="percent to be reached")
    parser.add_argument("--gamma", type=float, default=1.0, help="of both, in the second table")
    parser.add_argument("--budget", type=int, default=100, help="steps after which the second table gives up")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/attacks"))
    parser.add_argument("--render", action="store_true", help="only write the tables, from the files that are there")
    options = parser.parse_args()
    if not options.render:
        name = Path(options.checkpoint).stem if options.checkpoint else "untrained-skipnet-38"
        found = measure(options)
        write_text(options.out / f"{name}.json", json.dumps({"network": name, **found}, indent=2) + "\n")
    print(f"wrote {render(options.out)}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both tables of one network, with what they were measured on."""
    torch.manual_seed(0)
    network = (load(options.checkpoint) if options.checkpoint else SkipNet(38)).eval().to(memory_format=torch.channels_last)
    images, source = pictures(options.checkpoint, options.data, options.batch)
    images = images.contiguous(memory_format=torch.channels_last)
    ledger = price(network, images[:1])
    return {
        "machine": describe_machine(),
        "images": len(images),
        "source": source,
        "rounds": options.rounds,
        "timed_steps": options.steps,
        **speed(network, images, ledger, options.steps, options.rounds),
        "goal_percent": options.recovery,
        "gamma": options.gamma,
        "budget": options.budget,
        "race": race(network, images, ledger, options) if isinstance(network, SkipNet) else [],
    }


def pictures(checkpoint: str | None, folder: str | None, count: int) -> tuple[Tensor, str]:
    """Test images of the checkpoint's data set and its name, or noise of CIFAR-10's size; 8-bit either way."""
    data = None if checkpoint is None else data_of(checkpoint, folder, count)
    if data is None:
        return (255 * torch.rand(count, 3, 32, 32)).round() / 255, "noise"
    return pick_batch(data, count).images, data.name


def has(network: DynamicNetwork, images: Tensor, needs: Literal["exits", "blocks"] | None) -> bool:
    """Whether an attack with such needs can attack the network."""
    if needs == "exits":
        with torch.no_grad():
            return network(images[:1]).exits is not None
    return needs is None or isinstance(network, SkipNet)


def speed(network: DynamicNetwork, images: Tensor, ledger: FlopsLedger, steps: int, rounds: int) -> dict[str, Any]:
    """The first table: images per second of the yardstick, and a row per attack."""

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

    timed = {name: one for name, one in ATTACKS.items() if has(network, images, one.needs)}
    made = {name: one.make(min(steps, one.default)) for name, one in timed.items()}
    cases: dict[str, Callable[[], object]] = {name: lambda attack=attack: run(attack) for name, attack in made.items()}  # type: ignore[misc]
    seconds = interleaved({"yardstick": yardstick, **cases}, rounds=rounds, warmup=1)
    unit = seconds.pop("yardstick") / steps
    rows = []
    for name, spent in seconds.items():
        default = timed[name].default
        step = spent / min(steps, default)
        rows.append({"attack": name, "steps": default, "images_per_second": len(images) / (step * default), "ratio": step / unit, "seconds": spent})
    return {"passes_per_second": len(images) / unit, "speed": rows}


def race(network: DynamicNetwork, images: Tensor, ledger: FlopsLedger, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The second table; seconds are None where the recovery was not reached."""
    racers: dict[str, EnergyAttack] = {
        "GradMDM": GradMDM(gamma=options.gamma, steps=options.budget),
        "GradMDMReleased": GradMDMReleased(gamma=options.gamma, steps=options.budget),
    }
    # In turn, as the first table.
    runs = [{name: reached(attack, network, images, ledger, options.recovery) for name, attack in racers.items()} for _ in range(options.rounds)]
    rows = []
    for name in racers:
        found = [run[name] for run in runs]
        whole = [arrival for arrival in found if arrival is not None]
        arrived = len(whole) == len(found)
        rows.append(
            {
                "algorithm": name,
                "seconds": statistics.median(arrival[0] for arrival in whole) if arrived else None,
                "step": whole[0][1] if arrived else None,
                "mse_levels2": whole[0][2] if arrived else None,
            }
        )
    return rows


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


def render(out: Path) -> Path:
    """Write ATTACKS.md and attacks.csv from the networks' files below ``out``."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["network", "attack", "steps", "timed_steps", "images", "images_per_second", "ratio"])
    for each in found:
        for row in each["speed"]:
            figures = (f"{row['images_per_second']:.4g}", f"{row['ratio']:.4g}")
            writer.writerow([each["network"], row["attack"], row["steps"], each["timed_steps"], each["images"], *figures])
    write_text(out / "attacks.csv", stream.getvalue())
    lines = [
        "# Speed of the attacks",
        "",
        "Rendered by `python benchmarks/attacks.py --render` from the files beside this page.",
        *(line for each in found for line in page(each)),
    ]
    return write_text(out / "ATTACKS.md", "\n".join(lines) + "\n")


def page(found: dict[str, Any]) -> list[str]:
    """Both tables of one network as Markdown."""
    lines = [
        "",
        f"## {found['network']}",
        "",
        f"{found['machine']}; {found['images']} images ({found['source']}), median of {found['rounds']} rounds, {found['timed_steps']} steps timed.",
        f"One forward pass and one input-gradient: {found['passes_per_second']:.1f} images per second.",
        "",
        *table(
            ["attack", "steps", "images per second", "ratio of a step"],
            [[row["attack"], str(row["steps"]), f"{row['images_per_second']:.2f}", f"{row['ratio']:.2f}"] for row in found["speed"]],
        ),
    ]
    if found["race"]:
        heading = f"To {found['goal_percent']:g} % recovery at gamma {found['gamma']:g}, at most {found['budget']} steps:"
        rows = [
            [
                row["algorithm"],
                *([f"{row['seconds']:.2f}", str(row["step"]), f"{row['mse_levels2']:.3f}"] if row["seconds"] is not None else ["not reached"] * 3),
            ]
            for row in found["race"]
        ]
        lines += ["", heading, "", *table(["algorithm", "seconds", "step", "MSE (levels squared)"], rows)]
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table, its first column aligned to the left."""
    return [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


if __name__ == "__main__":
    main()
