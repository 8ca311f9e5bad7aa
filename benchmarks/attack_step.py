"""What one GradMDM iteration costs beyond the network itself, and how many images per second the whole attack makes.

    python benchmarks/attack_step.py [--batch 128] [--rounds 10] [--checkpoint skipnet-38-cifar10]

The yardstick is one masked forward pass and two input-gradient backward passes of the same network and batch, parameters frozen, in eval mode.
Both are timed in turn inside one run; the ratio must stay at or below 1.15. The loop folds BatchNorm into the convolutions and so may cost
less than the yardstick; the second ratio is against a yardstick that is folded too.
"""

from __future__ import annotations

import argparse
import time

import torch
from timing import describe_machine, interleaved

from gatewatt import load, price
from gatewatt.attacks import GradMDM
from gatewatt.attacks.base import folded
from gatewatt.gating import gate_table
from gatewatt.networks import SkipNet

STEPS = 5


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--checkpoint", default=None, help="default: an untrained SkipNet-38")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast, as training crafts")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = (load(options.checkpoint) if options.checkpoint else SkipNet(38)).eval().to(memory_format=torch.channels_last)
    images = torch.rand(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    ledger = price(network, images[:1])
    # No warm-up phase: every iteration is a full one, with both gradients.
    attack = GradMDM(steps=STEPS, warmup=0.0)

    def passes() -> None:
        for _ in range(STEPS):
            at = images.clone().requires_grad_()
            table = gate_table(network(at).gates)
            torch.autograd.grad(table.score.clamp(max=0.5).sum(), at, retain_graph=True)
            torch.autograd.grad(table.score.clamp(min=0.5).sum(), at)

    def yardstick() -> None:
        required = [parameter.requires_grad_(False) for parameter in network.parameters()]
        passes()
        for parameter in required:
            parameter.requires_grad_(True)

    def folded_yardstick() -> None:
        with folded(network):
            yardstick()

    def step() -> None:
        attack(network, images, ledger=ledger)

    with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
        seconds = interleaved({"attack": step, "yardstick": yardstick, "folded": folded_yardstick}, rounds=options.rounds)
    per_step = {name: value / STEPS for name, value in seconds.items()}
    precision = "bf16 autocast" if options.bf16 else "float32"
    ratios = {name: per_step["attack"] / per_step[name] for name in ("yardstick", "folded")}
    print(f"{describe_machine()}; SkipNet-38, batch {options.batch}, {precision}, median of {options.rounds} rounds")
    print(f"one GradMDM iteration                          {1e3 * per_step['attack']:9.1f} ms")
    print(f"one forward, two input-gradient backwards      {1e3 * per_step['yardstick']:9.1f} ms   ratio {ratios['yardstick']:.3f}")
    print(f"the same with BatchNorm folded                 {1e3 * per_step['folded']:9.1f} ms   ratio {ratios['folded']:.3f}")
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
        GradMDM()(network, images, ledger=ledger)
    print(f"whole attack, 100 iterations (20 on Eq. 6)     {options.batch / (time.perf_counter() - start):9.2f} images per second")


if __name__ == "__main__":
    main()
