"""price and audit: what each gate's decision costs, and the proof that the count is right."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import track
from torch import Tensor

from gatewatt.callbacks.console import percent, print_table
from gatewatt.cli.quiet import quiet
from gatewatt.defenses import Wrapper, behind
from gatewatt.flops import Routes, compare_routes, price, random_patterns
from gatewatt.gating import DynamicNetwork
from gatewatt.networks.checkpoint import card_of, load, load_weights
from gatewatt.recipes import Recipe

CONVENTION = "per image; 1 FLOP = 1 multiply-accumulate (MAC)"
DEFAULT_SIZE = 32
# Where recipes keep them, so that errors name the recipe's own keys.
NETWORK = "model.init_args.network"
DEFENSE = "model.init_args.defense"


class Subject(NamedTuple):
    """What is measured, built, behind its defense if it has one, and in eval mode."""

    network: DynamicNetwork
    data: LightningDataModule | None
    name: str
    size: int


def run(verb: str, recipe: Recipe, flags: Sequence[str]) -> int:
    """Run ``price`` or ``audit``; returns the exit code, 1 where an audit fails."""
    quiet()
    parser = make_parser(verb)
    options = parse(parser, recipe, flags)
    if verb == "audit" and options.images + options.patterns == 0:
        raise ValueError("images and patterns are both 0: there is nothing to compare")
    torch.manual_seed(options.get("seed") or 0)
    subject = build(parser.instantiate(options))
    recipe.running = True
    if verb == "price":
        show_prices(subject)
        return 0
    return audit(subject, images=options.images, patterns=options.patterns, seed=options.seed)


def make_parser(verb: str) -> ArgumentParser:
    """The flags of a verb, and the parts of a recipe that matter to it."""
    parser = ArgumentParser(prog=f"gatewatt {verb}", exit_on_error=False)
    parser.add_subclass_arguments(DynamicNetwork, NETWORK, required=False)
    parser.add_argument(f"--{DEFENSE}", type=Callable[[DynamicNetwork], Wrapper] | None, default=None)
    parser.add_argument("--config", action="config")
    parser.add_argument("--checkpoint", type=str | None, default=None)
    parser.add_argument("--bare", type=bool, default=False)
    parser.add_argument("--size", type=PositiveInt | None, default=None)
    if verb != "price":
        parser.add_subclass_arguments(LightningDataModule, "data", required=False)
    if verb == "audit":
        parser.add_argument("--images", type=NonNegativeInt, default=100)
        parser.add_argument("--patterns", type=NonNegativeInt, default=100)
        parser.add_argument("--seed", type=NonNegativeInt, default=0)
    return parser


def parse(parser: ArgumentParser, recipe: Recipe, flags: Sequence[str]) -> Namespace:
    """Read network, defense, checkpoint and data from the recipe, then the flags, which win."""
    settings: dict[str, Any] = {}
    task = recipe.settings.get("model")
    arguments = task.get("init_args") if isinstance(task, dict) else None
    if isinstance(arguments, dict):
        settings["checkpoint"] = arguments.get("checkpoint")
        settings["model"] = {"init_args": {part: arguments[part] for part in ("network", "defense") if arguments.get(part) is not None}}
    if "data" in recipe.settings and any(action.dest == "data" for action in parser._actions):
        settings["data"] = recipe.settings["data"]
    # The trainer verbs accept the short form --model.network.depth; so do these.
    short = [flag.replace("--model.network", f"--{NETWORK}", 1).replace("--model.defense", f"--{DEFENSE}", 1) for flag in flags]
    # One document before the flags, as for the trainer verbs: a flag may give what the recipe leaves out.
    return parser.parse_args([f"--config={json.dumps(settings)}", *short])


def build(built: Namespace) -> Subject:
    """Put weights into the network, or take the network from its checkpoint, put it behind its defense, and settle the size of the images.

    Where no defense is given it is the one that the checkpoint was trained behind, which ``bare`` leaves out.
    """
    network, defense, checkpoint, data = built.get(NETWORK), built.get(DEFENSE), built.checkpoint, built.get("data")
    card = {} if checkpoint is None else card_of(checkpoint)
    if network is None:
        if checkpoint is None:
            raise ValueError("no network is given; name a recipe with one, such as -c network/skipnet-38, or --checkpoint NAME")
        network = load(checkpoint)
    elif checkpoint is not None:
        load_weights(network, checkpoint)
    size = built.size or getattr(data, "size", None) or card.get("size")
    size = size if isinstance(size, int) else DEFAULT_SIZE
    if defense is not None:
        network = defense(network)
    elif card.get("defense") and not built.bare:
        network = behind(network, card["defense"], size=size)
        print(f"{checkpoint} was trained behind {card['defense']['name']} and is measured behind it; --bare true: the network inside")
    return Subject(network.eval(), data, checkpoint or type(network).__name__, size)


def show_prices(subject: Subject) -> None:
    """Print what each gate's decision costs."""
    ledger = price(subject.network, torch.full((1, 3, subject.size, subject.size), 0.5))
    lines = [
        (charge.module, " x ".join(charge.gates), " x ".join(f"{ledger.units[gate]:,}" for gate in charge.gates), ledger.prices[charge.module])
        for charge in ledger.charges
    ]
    lines += [("always computed", "", "", ledger.fixed - ledger.overhead), ("the gates themselves", "", "", ledger.overhead)]
    lines += [("everything closed", "", "", ledger.fixed), ("everything open", "", "", ledger.dense)]
    rows = [(module, gates, units, f"{macs:,.0f}", percent(macs / ledger.dense)) for module, gates, units, macs in lines]
    print_table(f"{subject.name} at {subject.size}x{subject.size}", ["module", "gates", "units", "MACs", "share"], rows, caption=CONVENTION)


def audit(subject: Subject, *, images: int, patterns: int, seed: int) -> int:
    """Compare four independent counts of really skipped passes and print how often they agree.

    Args:
        subject: network and, if the recipe has some, data.
        images: images whose own gates decide.
        patterns: random gate patterns that are forced, each on one image.
        seed: seed of random images and patterns.

    Returns:
        0 if all agree to the last FLOP and masked logits equal skipped logits, else 1.
    """
    pictures = list(pick_images(subject, max(images, 1), seed))
    ledger = price(subject.network, pictures[0])
    forced = random_patterns(subject.network, pictures[0], patterns, seed=seed)
    jobs: list[tuple[Tensor, dict[str, Tensor] | None]] = [(picture, None) for picture in pictures[:images]]
    jobs += [(pictures[index % len(pictures)], pattern) for index, pattern in enumerate(forced)]
    console = Console(stderr=True)
    routes = [
        compare_routes(subject.network, picture, ledger, pattern) for picture, pattern in track(jobs, "auditing", console=console, transient=True)
    ]
    show_routes(subject, routes[:images], routes[images:])
    failed = [index for index, route in enumerate(routes) if not route.agree]
    if failed:
        first = routes[failed[0]]
        print(f"{len(failed)} of {len(routes)} passes disagree; the first is pass {failed[0]}: {first}")
    return 1 if failed else 0


def pick_images(subject: Subject, count: int, seed: int) -> Iterator[Tensor]:
    """``count`` images (1, 3, H, W): the first of the data's test split, or random ones where there is no data.

    Raises:
        ValueError: if the data has fewer.
    """
    if subject.data is None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            # Of different contrast, so that gates have something to tell apart.
            contrast = torch.rand((), generator=generator)
            yield (0.5 + contrast * (torch.rand(1, 3, subject.size, subject.size, generator=generator) - 0.5)).clamp(0, 1)
        return
    subject.data.prepare_data()
    subject.data.setup("test")
    given = 0
    for batch in subject.data.test_dataloader():
        for image in batch.images[: count - given]:
            yield image[None]
            given += 1
        if given == count:
            return
    raise ValueError(f"images must be at most {given}, the size of the test set, got {count}")


def show_routes(subject: Subject, own: Sequence[Routes], forced: Sequence[Routes]) -> None:
    """Print how often each route agrees with the ledger."""
    groups = [(label, routes) for label, routes in (("own decisions", own), ("forced patterns", forced)) if routes]
    rows = [
        (label, *(f"{sum(map(same, routes))} of {len(routes)}" for _, routes in groups))
        for label, same in (
            ("fvcore trace of the skipped pass", lambda route: route.traced == route.ledger),
            ("FlopCounterMode / 2 on the same pass", lambda route: route.dispatched == route.ledger),
            ("forward hooks on the optional modules", lambda route: route.hooked == route.ledger),
            ("masked logits = skipped logits (1e-4)", lambda route: route.logit_difference <= 1e-4),
            ("all of them", lambda route: route.agree),
        )
    ]
    rows += [
        (label, *(f"{choose(route.ledger for route in routes):,.0f}" for _, routes in groups))
        for label, choose in (("fewest MACs of a pass", min), ("most MACs of a pass", max))
    ]
    title = f"{subject.name} at {subject.size}x{subject.size}: passes whose count equals the ledger's"
    print_table(title, ["route", *(label for label, _ in groups)], rows, caption=CONVENTION)
