"""Latency of the execution that really skips, against the dense one, beside the fraction of FLOPs that it runs.

    python benchmarks/skipped.py --data FOLDER [--checkpoint skipnet-38-cifar10] [--batches 1 128] [--rounds 20]

Real images (an ImageFolder split, such as cifar10/test) decide the gates: latency depends on which blocks run. Dense and skipped passes are
timed in turn inside one run on the same images, in float32; masked is beside them, since that is what most published code executes.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from timing import describe_machine, interleaved
from torch import Tensor

from gatewatt import load, price
from gatewatt.data import FolderData
from gatewatt.gating import DynamicNetwork, Execution


def run(network: DynamicNetwork, batches: list[Tensor], execution: Execution) -> None:
    """One pass over every batch."""
    for images in batches:
        network(images, execution)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder with test/<class>/*")
    parser.add_argument("--checkpoint", default="skipnet-38-cifar10")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 128])
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    network = load(options.checkpoint).to(memory_format=torch.channels_last)
    print(f"{describe_machine()}; {options.checkpoint}, float32, median of {options.rounds} rounds")
    print(f"{'batch':>5} {'FLOPs of dense':>15} {'dense ms':>10} {'skipped ms':>11} {'skipped/dense':>14} {'masked/dense':>13}")
    for batch in options.batches:
        # For single images, as many different ones per round as make the route representative.
        repeats = max(1, 32 // batch)
        data = FolderData(options.data, test_images=batch * repeats, eval_batch_size=batch)
        batches = [item.images.contiguous(memory_format=torch.channels_last) for item in data.test_dataloader()]
        ledger = price(network, batches[0][:1])
        with torch.no_grad():
            flops = torch.cat([ledger(network(images, "skipped").gates) for images in batches]).mean().item()
            executions: tuple[Execution, ...] = ("dense", "skipped", "masked")
            cases = {execution: partial(run, network, batches, execution) for execution in executions}
            seconds = {name: value / repeats for name, value in interleaved(cases, rounds=options.rounds).items()}
        ratios = [seconds[name] / seconds["dense"] for name in ("skipped", "masked")]
        print(
            f"{batch:>5} {100 * flops / ledger.dense:>13.1f} % {1e3 * seconds['dense']:>10.2f} {1e3 * seconds['skipped']:>11.2f} "
            f"{ratios[0]:>14.3f} {ratios[1]:>13.3f}"
        )


if __name__ == "__main__":
    main()
