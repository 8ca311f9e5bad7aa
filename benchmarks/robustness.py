"""Robust dynamic networks beside what they must beat: the undefended twin, accuracy-adversarial training, a static network, and a hard cap.

    python benchmarks/robustness.py --data digits --train skipnet-20-digits --seeds 0 1 2
    python benchmarks/robustness.py --data FOLDER --checkpoints sact-20-cifar10 sact-20-cifar10-robust FILE --guards sact-20-cifar10=0.7
    python benchmarks/robustness.py --data FOLDER --train skipnet-38-cifar10-hrl --undefended skipnet-38-cifar10-hrl

Every network meets every attack; each pair leaves summary.json and records.csv in OUT/<network>/seed<N>/<attack>, what `gatewatt test` writes. A
pair that is there is not measured again, and one of other weights, images or settings is refused. ROBUSTNESS.md and robustness.csv are rendered
from these files alone. FOLDER holds {train,test}/<class>/* of CIFAR-10.

--train runs the recipes <NAME>, <NAME>-robust, <NAME>-accuracy and <NAME>-static for every seed, as `gatewatt fit` does, into runs/<recipe>-seed<N>,
and takes up what is there. The static network gets the robust one's worst case for a budget: its mean FLOPs under the attack that costs it most. The
undefended twin behind a guard of that budget stands for what a hard cap does. A checkpoint that was trained behind a defense, a static one above all,
is measured behind it.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from contestants import ATTACKS, Contestant, Entry, data_of, entries, markdown, measured, over_seeds, trained

from gatewatt.cli.quiet import quiet
from gatewatt.files import write_text
from gatewatt.metrics.estimates import percentile_interval
from gatewatt.reports.collect import Run
from gatewatt.reports.matched import distinct_runs, interpolated, mean_mse, round_values
from gatewatt.reports.tables import csv_text


def raced(options: argparse.Namespace, measure: Callable[[Contestant], list[Run]]) -> None:
    """Train and measure the five contestants of a family, seed by seed."""
    root = () if options.data == "digits" else ("--data.root", options.data)
    for seed in options.seeds:

        def fit(kind: str, *flags: str, seed: int = seed) -> str:
            recipe = f"{options.train}{kind}"
            return trained(recipe, seed, Path("runs") / f"{recipe}-seed{seed}", *root, *flags)

        undefended = options.undefended or fit("")
        robust, accuracy = (fit(kind, "--model.checkpoint", undefended) for kind in ("-robust", "-accuracy"))
        spent = [float(run.flops[:, 2].mean() / run.flops[0, 0]) for run in measure(Contestant(robust))]
        # Up to the fourth digit: a route that costs exactly as much must fit.
        budget = math.ceil(1e4 * max(spent)) / 1e4
        for contestant in (Contestant(undefended), Contestant(accuracy), Contestant(undefended, budget)):
            measure(contestant)
        measure(Contestant(fit("-static", "--model.checkpoint", undefended, "--model.budget", str(budget))))


FIGURES = (
    "accuracy_clean_percent",
    "flops_clean",
    "flops_clean_std_percent",
    "routes_clean",
    "accuracy_adversarial_percent",
    "accuracy_adversarial_8bit_percent",
    "flops_adversarial",
    "flops_adversarial_p95",
    "recovery_percent",
    "recovery_low",
    "recovery_high",
    "recovery_8bit_percent",
    "mse_levels2",
    "images",
)
"""What the CSV repeats of each run."""


def line(group: Sequence[Entry]) -> list[str]:
    """One line of the table: a network under an attack, over its seeds."""
    first, figures = group[0], [entry.figures for entry in group]

    def share(value: Callable[[Entry], float]) -> str:
        return over_seeds([100 * value(entry) / entry.dense for entry in group])

    recovery = over_seeds([each.recovery_percent for each in figures])
    if len(group) == 1 and recovery != "-":
        recovery += f" [{figures[0].recovery_low:.1f}, {figures[0].recovery_high:.1f}]"
    budgets = [100 * entry.guard for entry in group if entry.guard is not None]
    return [
        first.network + (f" of {over_seeds(budgets)}" if budgets else ""),
        str(len(group)),
        over_seeds([each.accuracy_clean_percent for each in figures]),
        share(lambda entry: entry.figures.flops_clean),
        over_seeds([each.flops_clean_std_percent * each.flops_dense / entry.dense for each, entry in zip(figures, group, strict=True)]),
        "-" if figures[0].routes_clean is None else over_seeds([float(each.routes_clean or 0) for each in figures], 0, ""),
        first.attack,
        over_seeds([each.accuracy_adversarial_percent for each in figures]),
        share(lambda entry: entry.figures.flops_adversarial),
        share(lambda entry: entry.figures.flops_adversarial_p95),
        share(lambda entry: entry.most),
        recovery,
        over_seeds([each.recovery_8bit_percent for each in figures]),
        over_seeds([each.mse_levels2 for each in figures], 1, ""),
        str(figures[0].images),
    ]


COLUMNS = "network, seeds, accuracy, FLOPs, sd, routes, attack, accuracy attacked, FLOPs attacked, p95, max, recovery, 8-bit, MSE, images".split(", ")


def mean(group: Sequence[Entry], value: Callable[[Entry], float]) -> float:
    """Mean over seeds; NaN if one of them has nothing defined."""
    return statistics.mean(value(entry) for entry in group)


def against(twin: Sequence[Entry], group: Sequence[Entry]) -> list[str]:
    """One line of the second table: a network and its undefended twin under one attack."""

    def apart(value: Callable[[Entry], float]) -> str:
        return f"{mean(group, value) - mean(twin, value):+.1f}"

    def times(value: Callable[[Entry], float]) -> str:
        below = mean(twin, value)
        ratio = mean(group, value) / below if below else math.nan
        return "-" if math.isnan(ratio) else f"{ratio:.2f}"

    return [
        group[0].network,
        twin[0].network,
        group[0].attack,
        # An attack on the prediction leaves next to nothing to divide by.
        "-" if group[0].attack.startswith("accuracy") else times(lambda entry: entry.figures.recovery_percent),
        times(lambda entry: entry.figures.flops_adversarial),
        apart(lambda entry: 100 * entry.figures.flops_clean / entry.dense),
        times(lambda entry: entry.figures.flops_clean_std_percent * entry.figures.flops_dense / entry.dense),
        times(lambda entry: float(entry.figures.routes_clean or math.nan)),
        apart(lambda entry: entry.figures.accuracy_clean_percent),
        apart(lambda entry: entry.figures.accuracy_adversarial_percent),
    ]


TWIN_COLUMNS = "network, twin, attack, recovery, FLOPs attacked, FLOPs, sd, routes, accuracy, accuracy attacked".split(", ")


def twin_of(network: str, twins: Sequence[str]) -> str | None:
    """The undefended network that another one is named after; None for a twin itself, and for those named after none.

    Example:
        >>> twins = ["net", "net-hrl"]
        >>> [twin_of(name, twins) for name in ("net-robust", "net-hrl+guard", "net-hrl", "network")]
        ['net', 'net-hrl', None, None]
    """
    named = [twin for twin in twins if network.startswith((f"{twin}-", f"{twin}+"))]
    return None if network in twins else max(named, key=len, default=None)


def gradmdm_runs(found: Sequence[Entry], twin: str, twins: Sequence[str]) -> dict[str, list[Run]]:
    """The runs under GradMDM of a twin, and of the networks that are named after it and have something to recover, of the twin's first seed."""
    seed = next((entry.seed for entry in found if entry.network == twin), None)
    runs: dict[str, list[Run]] = defaultdict(list)
    for entry in found:
        own = entry.network == twin or twin_of(entry.network, twins) == twin
        if own and entry.seed == seed and entry.attack.startswith("gradmdm") and not math.isnan(entry.figures.recovery_percent):
            runs[entry.network].append(entry.run)
    return runs


def at_equal_mse(twin: str, networks: Mapping[str, Sequence[Run]]) -> list[list[str]]:
    """What GradMDM recovers of a twin and of those named after it, at MSE values that all of them cover; empty if there are none.

    Args:
        twin: the undefended network.
        networks: name -> runs of one seed at several gammas, on the same images for all.
    """
    curves = {name: found for name, runs in networks.items() if len(found := distinct_runs(list(runs), "float")) > 1}
    if len(curves) < 2 or twin not in curves or len({run.ids for runs in curves.values() for run in runs}) > 1:
        return []
    low, high = (edge(mean_mse(runs[place], "float") for runs in curves.values()) for edge, place in ((max, 0), (min, -1)))
    if low >= high:
        return []
    values = round_values(low, high)
    samples = dict(zip(curves, interpolated(list(curves.values()), np.log(values), "float", draws=2000, seed=0), strict=True))
    lines = []
    for index, value in enumerate(values):
        for name, found in samples.items():
            start, end = percentile_interval(found[1:, index], 95.0)
            ratio = "" if name == twin else f"{found[0, index] / samples[twin][0, index]:.2f}"
            lines.append([name, f"{value:.3g}", f"{found[0, index]:.1f} % [{start:.1f}, {end:.1f}]", ratio])
    return lines


def render(out: Path, twins: Sequence[str] = ()) -> str:
    """Write the page and the CSV; returns the tables. ``twins`` name undefended networks, against which those named after them are set."""
    found = entries(out)
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in found:
        groups[entry.network, entry.attack].append(entry)
    order = list(ATTACKS)
    ordered = sorted(groups, key=lambda key: (order.index(key[1]) if key[1] in order else len(order), key))
    table = markdown(COLUMNS, [line(groups[key]) for key in ordered])
    missing = set(twins) - {network for network, _ in groups}
    if missing:
        raise SystemExit(f"{out} holds no runs of {', '.join(sorted(missing))}; there are {', '.join(sorted({network for network, _ in groups}))}")
    if twins:
        pairs = [(twin_of(network, twins), network, attack) for network, attack in ordered]
        table += [
            "",
            "Against the undefended twin under the same attack: recovery, attacked FLOPs, spread of clean FLOPs and number of clean routes as a",
            "ratio; clean FLOPs (of dense) and accuracies in points.",
            "",
            *markdown(
                TWIN_COLUMNS, [against(groups[twin, attack], groups[network, attack]) for twin, network, attack in pairs if (twin, attack) in groups]
            ),
        ]
        equal = [cells for twin in twins for cells in at_equal_mse(twin, gradmdm_runs(found, twin, twins))]
        if equal:
            table += ["", "GradMDM at equal MSE (squared 8-bit levels), interpolated between gammas; in the last column by the twin's.", ""]
            table += markdown(["network", "MSE", "recovery", "of the twin's"], equal)
    page = [
        "# Robust dynamic networks, and what they must beat",
        "",
        "Rendered by `python benchmarks/robustness.py` from the records beside this page. FLOPs are means over images, as shares of the dense FLOPs",
        "of the network without its defense; *sd* is over images, *routes* counts different routes of clean images, *p95* and *max* are over",
        "attacked images. Of several seeds the mean, and in brackets the lowest and the highest; of one, recovery has a 95 % bootstrap interval over",
        "images in square brackets. A static network has nothing to recover (-). *linf-4* is AutoEnergy within 4/255, and so on; *accuracy-linf-4*",
        "is PGD against the prediction. MSE is in squared 8-bit levels: GradMDM (of gamma 100, or as named) has no radius, and is to be compared at",
        "equal MSE alone.",
        "",
        *table,
    ]
    write_text(out / "ROBUSTNESS.md", "\n".join(page) + "\n")
    header = ["network", "seed", "attack", "flops_dense", *FIGURES, "flops_adversarial_max"]
    rows = [[entry.network, entry.seed, entry.attack, entry.dense, *(getattr(entry.figures, key) for key in FIGURES), entry.most] for entry in found]
    write_text(out / "robustness.csv", csv_text(header, rows))
    return "\n".join(table)


def guard_of(text: str) -> Contestant:
    """A network behind a guard, from ``CHECKPOINT=BUDGET``."""
    name, _, budget = text.rpartition("=")
    return Contestant(name, float(budget))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, or a folder of CIFAR-10")
    parser.add_argument("--checkpoints", nargs="+", default=[], help="shipped names or files")
    parser.add_argument("--guards", nargs="+", type=guard_of, default=[], metavar="CHECKPOINT=BUDGET", help="networks behind a guard")
    parser.add_argument("--train", metavar="NAME", help="train the recipes NAME, NAME-robust, NAME-accuracy and NAME-static")
    parser.add_argument("--undefended", metavar="CHECKPOINT", help="with --train: start from this one instead of training NAME")
    parser.add_argument("--twins", nargs="+", default=[], metavar="NETWORK", help="undefended, to set those against that are named after them")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--images", type=int, default=None, help="test images (default: 400 digits, 1,000 of CIFAR-10)")
    parser.add_argument("--steps", type=int, default=100, help="of every attack")
    parser.add_argument("--precision", default="32-true", help="of crafting; figures are taken in float32 in any case")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/robustness"))
    options = parser.parse_args(arguments)
    quiet()
    data = data_of(options.data, options.images or (400 if options.data == "digits" else 1000))

    def measure(contestant: Contestant) -> list[Run]:
        folder = options.out / contestant.folder
        return [measured(contestant, ATTACKS[name](options.steps), data, folder / name, options.precision) for name in options.attacks]

    for contestant in [*map(Contestant, options.checkpoints), *options.guards]:
        measure(contestant)
    twins = list(options.twins)
    if options.train:
        raced(options, measure)
        twins.append(Path(options.undefended or options.train).stem)
    print(render(options.out, twins))


if __name__ == "__main__":
    main()
