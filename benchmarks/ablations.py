"""Which term of energy-adversarial training does what: each is taken out in turn, and what is left is attacked.

    python benchmarks/ablations.py --seeds 0 1 2
    python benchmarks/ablations.py --variants all "no gap" --seeds 0
    python benchmarks/ablations.py --seeds                       # the page alone, from the records

Every variant is recipes/skipnet-20-digits-gap.yaml with a flag or two, trained from the same weights into runs/ablation-<variant>-seed<N> unless it
is there. Each leaves summary.json and records.csv in OUT/<variant>/seed<N>/<attack>, as benchmarks/robustness.py does, and ABLATIONS.md is rendered
from these files alone; the undefended network stands beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from contestants import ATTACKS, Contestant, Entry, data_of, entries, markdown, measured, over_seeds, trained

from gatewatt.cli.quiet import quiet
from gatewatt.files import write_text

UNDEFENDED = "skipnet-20-digits"
RECIPE = "skipnet-20-digits-gap"

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "all": (),
    "no consistency": ("--model.objective.consistency", "0"),
    "no gap": ("--model.objective.gap", "0"),
    "no gate gap": ("--model.objective.gate_gap", "0"),
    "no gaps": ("--model.objective.gap", "0", "--model.objective.gate_gap", "0"),
    "no saturation": ("--model.objective.saturation", "0"),
    "no budget": ("--model.objective.clean.weight", "0"),
    "no variance floor": ("--model.objective.clean.diversity", "0"),
    "no budget, no floor": ("--model.objective.clean.weight", "0", "--model.objective.clean.diversity", "0"),
    "no ramp": ("--model.objective.ramp", "[0, 0]"),
    "no goal mix": ("--model.mix.keep", "0", "--model.mix.mislead", "0"),
    "no masking": ("--model.mix.masking", "0"),
    "no random start": ("--model.mix.random_start", "false"),
    "no cache": ("--model.cache", "null"),
    "distilled as well": ("--model.objective.distillation", "2"),
    "distilled, no gaps": ("--model.objective.distillation", "2", "--model.objective.gap", "0", "--model.objective.gate_gap", "0"),
}
"""What is left out, or added -> the flags that say so."""

COLUMNS = "variant, seeds, accuracy, FLOPs, sd, routes, FLOPs attacked, p95, recovery, accuracy attacked".split(", ")


def slug(variant: str) -> str:
    """Name of a variant's folder.

    Example:
        >>> slug("no budget, no floor")
        'no-budget-no-floor'
    """
    return variant.replace(",", "").replace(" ", "-")


def line(group: Sequence[Entry]) -> list[str]:
    """One line of the table: a variant over its seeds."""
    figures = [entry.figures for entry in group]

    def share(values: Sequence[float]) -> str:
        return over_seeds([100 * value / entry.dense for value, entry in zip(values, group, strict=True)])

    return [
        group[0].network,
        str(len(group)),
        over_seeds([each.accuracy_clean_percent for each in figures]),
        share([each.flops_clean for each in figures]),
        over_seeds([each.flops_clean_std_percent for each in figures]),
        over_seeds([float(each.routes_clean or 0) for each in figures], 0, ""),
        share([each.flops_adversarial for each in figures]),
        share([each.flops_adversarial_p95 for each in figures]),
        over_seeds([each.recovery_percent for each in figures]),
        over_seeds([each.accuracy_adversarial_percent for each in figures]),
    ]


def render(out: Path) -> str:
    """Write the page; returns its tables, one an attack."""
    found = entries(out)
    order = [UNDEFENDED, *map(slug, VARIANTS)]
    table: list[str] = []
    for attack in [name for name in ATTACKS if any(entry.attack == name for entry in found)]:
        groups = [[entry for entry in found if (entry.network, entry.attack) == (name, attack)] for name in order]
        table += ["", f"**{attack}**", "", *markdown(COLUMNS, [line(group) for group in groups if group])]
    steps, images = found[0].run.summary["attack"]["steps"], found[0].figures.images
    page = [
        "# What each term of energy-adversarial training does",
        "",
        f"Rendered by `python benchmarks/ablations.py` from the records beside this page: a small SkipNet-20 on the embedded digits, {images}",
        f"test images, AutoEnergy of {steps} steps (*linf-4* within 4/255, and so on). Every variant is `recipes/{RECIPE}.yaml` with the",
        f"flags that the script names, trained from `{UNDEFENDED}`. FLOPs are shares of dense; *sd* is over images, *routes* counts",
        "different routes of clean images. Means over seeds, in brackets the lowest and the highest.",
        *table,
    ]
    write_text(out / "ABLATIONS.md", "\n".join(page) + "\n")
    return "\n".join(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], help="none: only render")
    parser.add_argument("--attacks", nargs="+", default=["linf-4", "linf-8"], choices=list(ATTACKS))
    parser.add_argument("--images", type=int, default=200, help="test images")
    parser.add_argument("--steps", type=int, default=10, help="of every attack")
    parser.add_argument("--epochs", type=int, default=None, help="of training (default: the recipe's)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ablations"))
    options = parser.parse_args(arguments)
    quiet()
    data = data_of("digits", options.images)
    epochs = () if options.epochs is None else ("--trainer.max_epochs", str(options.epochs))

    def measure(contestant: Contestant, folder: Path) -> None:
        for name in options.attacks:
            measured(contestant, ATTACKS[name](options.steps), data, folder / name, "32-true")

    measure(Contestant(UNDEFENDED), options.out / UNDEFENDED / "seed0")
    for seed in options.seeds:
        for variant in options.variants:
            checkpoint = trained(RECIPE, seed, Path("runs") / f"ablation-{slug(variant)}-seed{seed}", *VARIANTS[variant], *epochs)
            measure(Contestant(checkpoint), options.out / slug(variant) / f"seed{seed}")
    print(render(options.out))


if __name__ == "__main__":
    main()
