"""Rows 1 and 2: four counts of one pass agree to the last FLOP, and a batch that really skips computes what masking computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.promises.base import Outcome, apart, tally

BATCHES = (1, 2, 3, 5, 8, 16)


def routes(count: int, folder: Path) -> Outcome:
    """``count`` forced random gate patterns over every shipped checkpoint: ledger, fvcore, dispatcher and hooks are one number."""
    return apart(_routes, count, folder, log=folder / "routes.log", timeout=4 * 3600)


def subjects(count: int) -> Iterator[tuple[str, Any, int, int]]:
    """Name, network, image side and passes of everything to be measured, ``count`` passes in all."""
    import torch

    from gatewatt.networks import SkipNet
    from gatewatt.networks.checkpoint import card_of, load
    from gatewatt.shipped import shipped

    # The large ones take most of the time, so a small count goes to a small network alone.
    names = shipped("checkpoints", ".safetensors") if count >= 100 else []
    for index, name in enumerate(names):
        size = card_of(name).get("size")
        passes = count // len(names) + (index < count % len(names))
        yield name, load(name), size if isinstance(size, int) else 32, passes
    if not names:
        torch.manual_seed(1)
        yield "SkipNet(8, width=4)", SkipNet(8, width=4).eval(), 32, count


def pictures(count: int, size: int, seed: int) -> Any:
    """Random images (count, 3, size, size) of different contrast, so that gates have something to tell apart."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(count, 1, 1, 1, generator=generator)
    return (0.5 + contrast * (torch.rand(count, 3, size, size, generator=generator) - 0.5)).clamp(0, 1)


def _routes(count: int, folder: Path) -> Outcome:
    from gatewatt.flops import compare_routes, price, random_patterns

    results: list[str | None] = []
    notes = []
    for name, network, size, passes in subjects(count):
        image = pictures(1, size, seed=1)
        ledger = price(network, image)
        counts = set()
        for index, pattern in enumerate(random_patterns(network, image, passes, seed=1)):
            route = compare_routes(network, pictures(1, size, seed=index), ledger, pattern)
            results.append(None if route.agree else f"{name}, pattern {index}: {route}")
            counts.add(route.traced)
        # A pattern that is not obeyed would agree with itself all the same: a network with two exits has three counts, others about one per pattern.
        if passes > 1 and len(counts) == 1:
            results.append(f"{name}: {passes} random patterns cost the same")
        notes.append(f"{name} {passes} patterns, {len(counts)} costs")
    return tally(results, "; ".join(notes))


def skipped(count: int, folder: Path) -> Outcome:
    """``count`` batches of 1 to 16 images that really skip: gates as masked, logits to 1e-6, and the ledger's FLOPs."""
    return apart(_skipped, count, folder, log=folder / "skipped.log", timeout=4 * 3600)


def _skipped(count: int, folder: Path) -> Outcome:
    import torch

    from gatewatt.flops import ExecutionMeter, audit_dispatched, price, random_patterns
    from gatewatt.gating import forced

    results: list[str | None] = []
    largest = 0.0
    names = []
    for name, network, size, passes in subjects(count):
        names.append(f"{name} {passes}")
        ledger = price(network, pictures(1, size, seed=0))
        for index in range(passes):
            batch = pictures(BATCHES[index % len(BATCHES)], size, seed=index)
            pattern = random_patterns(network, batch, 1, seed=index)[0]

            def both(network: Any = network, batch: Any = batch, ledger: Any = ledger) -> tuple[Any, Any, float]:
                with torch.no_grad():
                    masked = network(batch, "masked")
                    with ExecutionMeter(network, ledger) as meter:
                        return masked, network(batch, "skipped"), meter.total

            # Batches of every size by their own decisions, and by forced ones, which reach patterns that training never shows.
            if (index // len(BATCHES)) % 2:
                with forced(network, pattern):
                    masked, really, ran = both()
                    dispatched = audit_dispatched(network, batch)
            else:
                masked, really, ran = both()
                dispatched = audit_dispatched(network, batch)
            difference = float((masked.logits - really.logits).abs().max() / really.logits.abs().max())
            largest = max(largest, difference)
            gates = all(torch.equal(masked.gates[gate].executed, really.gates[gate].executed) for gate in masked.gates)
            costs = {float(ledger(really.gates).sum()), ran, float(dispatched)}
            faults = [
                *([f"logits differ by {difference:.1e}"] if difference > 1e-6 else []),
                *([] if gates else ["gates differ"]),
                *([f"costs {sorted(costs)}"] if len(costs) > 1 else []),
            ]
            results.append(f"{name}, batch {index} of {len(batch)}: {', '.join(faults)}" if faults else None)
    note = f"largest difference of logits {largest:.1e} of the largest logit, float32; costs by ledger, hooks and dispatcher; batches of 1 to 16: "
    return tally(results, note + ", ".join(names))
