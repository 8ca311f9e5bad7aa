"""What a budget guard costs, and what it certifies: accuracy and clean FLOPs against the most that any attack can recover.

    python benchmarks/frontier.py --data FOLDER
    python benchmarks/frontier.py --data FOLDER --checkpoints skipnet-38-cifar10-hrl --budgets 0.5 0.6 0.7 --images 8000

No attack is run: behind a guard no image can cost more than its certificate, so recovery is at most what lies between that and the clean images.
Three guards: one serves gates as they come, one gives each its part of the budget, one keeps room for those that images use most; and the static
route of the latter alone. Weights are as they are. One file a network in OUT, frontier-<checkpoint>.json; a network that is there is not measured
again, and one of other weights, images or budgets is refused. FRONTIER.md is rendered from these files alone.
FOLDER holds {train,test}/<class>/* of CIFAR-10.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from contestants import data_of, markdown

from gatewatt import load, price
from gatewatt.cli.quiet import quiet
from gatewatt.data import ImageData
from gatewatt.data.batch import BatchKey
from gatewatt.data.splits import subset
from gatewatt.defenses import BudgetGuard, FixedRoute, ReservingGuard, busiest_route
from gatewatt.files import write_text
from gatewatt.flops import measuring, within_reach
from gatewatt.gating import DynamicNetwork, gate_table
from gatewatt.metrics.estimates import route_statistics
from gatewatt.networks.checkpoint import card_of
from gatewatt.reports.figures import COLOURS
from gatewatt.reports.plots import drawn
from gatewatt.tasks.evaluate import CleanEvaluation

NETWORKS = (
    "skipnet-38-cifar10",
    "skipnet-38-cifar10-lean",
    "skipnet-38-cifar10-hrl",
    "sact-20-cifar10",
    "manidp-20-cifar10",
    "shallow-deep-resnet-20-cifar10",
    "dvt-compact-cifar10",
    "avit-compact-cifar10",
)
CHOOSING = 256
"""Training images on which the static route is chosen, as the task of static training does."""


def clean_figures(network: DynamicNetwork, data: ImageData, dense: float) -> dict[str, Any]:
    """Accuracy, FLOPs (of ``dense``) and their spread, and the number of routes, on clean test images; the most FLOPs that any image can cost."""
    image = torch.zeros(1, 3, data.size, data.size)
    ledger = price(network, image)
    evaluation = CleanEvaluation(network, ledger, int(network.arguments["num_classes"]))
    spent, executed = [], []
    with measuring(network):
        for batch in data.test_dataloader():
            output, flops = evaluation.step(batch)
            spent.append(flops)
            executed.append(gate_table(output.gates).executed)
    flops = torch.cat(spent) / dense
    return {
        "accuracy": float(evaluation.accuracy.compute()),
        "flops": float(flops.mean()),
        "flops_sd": float(flops.std(unbiased=False)),
        "routes": route_statistics(torch.cat(executed).numpy()).routes,
        "most": within_reach(network, ledger, image).dense / dense,
    }


def points_of(checkpoint: str, budgets: Sequence[float], data: ImageData) -> list[dict[str, Any]]:
    """The network as it is, then each budget's guards and static route; budgets below what always runs are left out."""
    image = torch.zeros(1, 3, data.size, data.size)
    network = load(checkpoint).eval()
    ledger = price(network, image)
    points = [{"budget": None, "kind": "no guard", **clean_figures(network, data, ledger.dense)}]
    training = data.split("train").augmented(None)
    chosen = subset(len(training), CHOOSING, data.split_seed)
    pixels = training[BatchKey(data.seed, 0, 0, chosen)].images
    for budget in budgets:
        try:
            guards = {kind: BudgetGuard(network, budget, pace=pace, size=data.size) for kind, pace in (("as they come", 0.0), ("paced", 1.0))}
        except ValueError as error:
            print(f"{checkpoint}: {error}")
            continue
        points += [{"budget": budget, "kind": kind, **clean_figures(guarded, data, ledger.dense)} for kind, guarded in guards.items()]
        if all(units == 1 for units in ledger.units.values()):
            route = busiest_route(network, pixels, budget)
            # A route changes how the network inside decides.
            static = FixedRoute(load(checkpoint).eval(), route, size=data.size)
            for kind, other in (("reserving", ReservingGuard(network, budget, route, size=data.size)), ("static", static)):
                points.append({"budget": budget, "kind": kind, **clean_figures(other, data, ledger.dense)})
    return points


def measured(checkpoint: str, budgets: Sequence[float], data: ImageData, path: Path) -> dict[str, Any]:
    """The file of a network; made unless it is there.

    Raises:
        SystemExit: if it is of other weights, images or budgets.
    """
    asked = {"checkpoint": checkpoint, "sha256": card_of(checkpoint)["sha256"], "images": data.test_images, "budgets": list(budgets)}
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        differing = [key for key, value in asked.items() if found[key] != value]
        if differing:
            raise SystemExit(f"{path} is of another {' and '.join(differing)}; remove it, or choose another --out")
        return found
    found = {**asked, "points": points_of(checkpoint, budgets, data)}
    write_text(path, json.dumps(found, indent=2) + "\n")
    return found


def certified(point: Mapping[str, Any]) -> float:
    """What any attack recovers at most, in percent: the ratio of sums, with every image at the most that it can cost.

    Example:
        >>> certified({"most": 0.75, "flops": 0.5})
        50.0
    """
    return 100 * (point["most"] - point["flops"]) / (1 - point["flops"])


COLUMNS = "network, budget, guard, accuracy, FLOPs, sd, routes, most FLOPs, recovery at most".split(", ")


def line(checkpoint: str, point: Mapping[str, Any]) -> list[str]:
    """One line of the table."""
    return [
        checkpoint,
        "-" if point["budget"] is None else f"{100 * point['budget']:.1f} %",
        point["kind"],
        f"{100 * point['accuracy']:.1f} %",
        f"{100 * point['flops']:.1f} %",
        f"{100 * point['flops_sd']:.1f} %",
        str(point["routes"]),
        f"{100 * point['most']:.1f} %",
        "-" if point["kind"] == "static" else f"{certified(point):.1f} %",
    ]


def draw(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against the certificate, a colour a network."""
    with drawn(path, 8.0, 5.6) as axes:
        (plot,) = axes.flat
        for number, each in enumerate(found):
            colour = COLOURS[number % len(COLOURS)]
            for kind, style, marker in (("as they come", "--", "o"), ("paced", "-.", "d"), ("reserving", "-", "s"), ("static", ":", "^")):
                points = sorted((100 * point["most"], 100 * point["accuracy"]) for point in each["points"] if point["kind"] == kind)
                if points:
                    x, y = zip(*points, strict=True)
                    plot.plot(x, y, style, marker=marker, markersize=4, linewidth=1.2, color=colour, label=f"{each['checkpoint']}, {kind}")
        plot.set_xlabel("most FLOPs of any image, % of dense (certified)")
        plot.set_ylabel("accuracy on clean images, %")
        plot.grid(True, linewidth=0.3, alpha=0.6)
        plot.legend(fontsize=5, ncols=2)


def render(out: Path) -> str:
    """Write the page and the figure; returns the table."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("frontier-*.json"))]
    table = markdown(COLUMNS, [line(each["checkpoint"], point) for each in found for point in each["points"]])
    page = [
        "# What a budget guard costs, and what it certifies",
        "",
        f"Rendered by `python benchmarks/frontier.py` from the files beside this page; {found[0]['images']} clean test images, no further training.",
        "Shares are of the dense FLOPs. *recovery at most* needs no attack: it is what remains between the clean images and the most that any image",
        "can cost. *as they come*: BudgetGuard; *paced*: BudgetGuard of pace 1; *reserving*: ReservingGuard of the busiest route that fits into the",
        "budget; *static*: that route for every image. Networks whose gates have many units have the first two alone.",
        "",
        "![Accuracy against the certificate](frontier.png)",
        "",
        *table,
    ]
    write_text(out / "FRONTIER.md", "\n".join(page) + "\n")
    draw(found, out / "frontier.png")
    return "\n".join(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="a folder of CIFAR-10, or digits")
    parser.add_argument("--checkpoints", nargs="+", default=list(NETWORKS), help="shipped names or files")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.5, 0.6, 0.661, 0.75, 0.9], help="shares of the dense FLOPs")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frontier"))
    options = parser.parse_args(arguments)
    quiet()
    data = data_of(options.data, options.images)
    data.prepare_data()
    data.setup("test")
    for checkpoint in options.checkpoints:
        measured(checkpoint, options.budgets, data, options.out / f"frontier-{Path(checkpoint).stem}.json")
    print(render(options.out))


if __name__ == "__main__":
    main()
