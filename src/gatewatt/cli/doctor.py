"""doctor: is what attacks say about a network to be believed?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gatewatt.cli.errors import flag_values
from gatewatt.cli.folder import reserve_folder
from gatewatt.cli.meter import build, make_parser, parse
from gatewatt.cli.quiet import quiet
from gatewatt.cli.trainer import check_classes
from gatewatt.data.batch import Batch
from gatewatt.defenses import described as described_defense
from gatewatt.diagnosis import Diagnosis, Evidence, Settings, examine
from gatewatt.diagnosis.examine import asked, conclude
from gatewatt.metrics import write_summary
from gatewatt.networks.checkpoint import card_of, load
from gatewatt.recipes import Recipe, load_recipes
from gatewatt.shipped import shipped

COLORS = {"pass": "green", "fail": "red", "cannot tell": "yellow"}


def run(verb: str, recipe: Recipe, flags: Sequence[str]) -> int:
    """Examine a network; returns the exit code, 1 where a check fails."""
    quiet()
    parser = make_parser(verb)
    parser.add_argument("--images", type=PositiveInt, default=100)
    parser.add_argument("--steps", type=PositiveInt, default=50)
    parser.add_argument("--norm", type=Literal["linf", "l2"], default="linf")
    parser.add_argument("--eps", type=PositiveFloat | None, default=None)
    parser.add_argument("--source", type=str | None, default=None)
    parser.add_argument("--batch", type=PositiveInt, default=50)
    parser.add_argument("--seed", type=NonNegativeInt, default=0)
    parser.add_argument("--device", type=str | None, default=None)
    parser.add_argument("--run", type=str | None, default=None)
    add_own_data(recipe, flags)
    options = parse(parser, recipe, flags)
    torch.manual_seed(options.seed)
    subject = build(parser.instantiate(options))
    if subject.data is None:
        raise ValueError("no data is given, and random images would say nothing; name some, such as -c data/digits")
    check_classes(subject, subject.data)
    recipe.running = True
    batch = pick_batch(subject.data, options.images)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = None if options.source is None else load(options.source).eval().to(device)
    settings = Settings(options.norm, options.eps, options.steps, options.batch, options.seed)
    evidence = Evidence(subject.network.to(device), batch.images.to(device), batch.labels.to(device), settings, source=source)
    names = asked(evidence)
    checks = list(track(examine(evidence), "examining", total=len(names), console=Console(stderr=True), transient=True))
    diagnosis = conclude(evidence, checks)
    name, defense = Path(subject.name).stem, described_defense(subject.network)
    show(diagnosis, name if defense is None else f"{name} behind {defense['name']}", getattr(subject.data, "name", type(subject.data).__name__))
    folder = reserve_folder(options.run or f"doctor-{name}")
    print(f"wrote {write_summary(folder / 'diagnosis.json', described(diagnosis, subject.name, defense, options))}")
    return 0 if diagnosis.believable else 1


def add_own_data(recipe: Recipe, flags: Sequence[str]) -> None:
    """Where neither recipe nor flags name a data set, take the one that the checkpoint's card names, if it is shipped as a recipe."""
    given = {leaf.key: leaf.value for leaf in flag_values(flags)}
    checkpoint = given.get(("checkpoint",)) or recipe.settings.get("model", {}).get("init_args", {}).get("checkpoint")
    if "data" in recipe.settings or ("data",) in given or ("data", "class_path") in given or not isinstance(checkpoint, str):
        return
    fragment = f"data/{card_of(checkpoint).get('dataset')}"
    if fragment in shipped("recipes", ".yaml"):
        own = load_recipes([fragment])
        recipe.settings["data"] = own.settings["data"]
        recipe.origins.update({key: origin for key, origin in own.origins.items() if key[0] == "data"})


def pick_batch(data: LightningDataModule, count: int) -> Batch:
    """The first ``count`` test images of the data's seeded permutation: in their own order folders would give one class after the other.

    Raises:
        ValueError: if the data has fewer.
    """
    if getattr(data, "test_images", None) is None:
        data.test_images = count  # type: ignore[attr-defined]
    data.prepare_data()
    data.setup("test")
    parts, found = [], 0
    for batch in data.test_dataloader():
        parts.append(batch)
        found += len(batch.images)
        if found >= count:
            return Batch(*(torch.cat(column)[:count] for column in zip(*parts, strict=True)))
    raise ValueError(f"images must be at most {found}, the size of the test set, got {count}")


def show(diagnosis: Diagnosis, network: str, data: str) -> None:
    """Print every check and the verdict."""
    settings = diagnosis.settings
    strength = f"{settings['norm']} {settings['eps']:.4g}, {settings['steps']} steps"
    table = Table(
        title=f"{network} on {settings['images']} images of {data} ({strength})",
        caption="Figures with a 95 % interval over images in brackets; recovery is the ratio of sums.",
        title_justify="left",
        caption_justify="left",
    )
    for heading in ("check", "outcome", "measured", "bar", "which says"):
        table.add_column(heading)
    table.add_column("seconds", justify="right")
    for check in diagnosis.checks:
        outcome = f"[{COLORS[check.outcome]}]{check.outcome}[/]"
        table.add_row(check.name, outcome, check.finding.measured, check.bar, check.reason, f"{check.seconds:.1f}")
    console = Console()
    # A pipe has no width, and rich would fold every cell at 80 columns.
    (console if console.is_terminal else Console(width=200)).print(table)
    print(f"verdict: {diagnosis.verdict}")


def described(diagnosis: Diagnosis, network: str, defense: dict[str, Any] | None, options: Namespace) -> dict[str, object]:
    """The diagnosis as the JSON file has it, with what it was made of."""
    data = options.get("data")
    return {
        "checkpoint": network,
        "defense": defense,
        "source_checkpoint": options.source,
        "data": None if data is None else data.as_dict(),
        **diagnosis.as_dict(),
    }
