"""The price list of a network: one dense fvcore trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gatewatt.flops.handles import analyse
from gatewatt.flops.ledger import FlopsLedger
from gatewatt.gating import DynamicNetwork, Execution, check_images, require_gates


class Traceable(nn.Module):
    """A forward that returns plain tensors, the scores among them.

    fvcore's trace drops every operator whose result is not returned, so gates that only steer Python control flow would cost nothing.
    """

    def __init__(self, network: DynamicNetwork, execution: Execution) -> None:
        super().__init__()
        self.network, self.execution = network, execution

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits, then the score of every gate."""
        output = self.network(images, self.execution)
        return (output.logits, *(gate.score for gate in output.gates.values()))


@contextmanager
def measuring(network: DynamicNetwork) -> Iterator[None]:
    """Eval mode, float32 and no gradient within the block; every training flag as it was afterwards.

    A trace in train mode would update BatchNorm statistics, and autocast would make it count casts.
    """
    flags = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def price(network: DynamicNetwork, example: Tensor) -> FlopsLedger:
    """Price every optional module of ``network`` with one dense fvcore trace.

    Args:
        network: any :class:`~gatewatt.gating.DynamicNetwork`.
        example: one image (1, 3, H, W) in [0, 1]; prices hold for its resolution.

    Returns:
        The ledger, in MACs per image (1 MAC = 1 FLOP).

    Raises:
        ValueError: if ``example`` is not one valid image, the network has no gates, a charge names a module that did not run, or a module
            would be paid twice.
        UnpricedOperator: if an operator has no formula.

    Example:
        >>> from gatewatt.networks import SkipNet
        >>> price(SkipNet(depth=38), torch.zeros(1, 3, 32, 32)).dense
        83300362.0
    """
    check_images(example)
    if len(example) != 1:
        raise ValueError(f"price takes one image, shape (1, 3, H, W), got a batch of {len(example)}")
    with measuring(network):
        gates = network(example, "dense").gates
        require_gates(gates)
        counts = analyse(Traceable(network, "dense"), (example,)).by_module()
    if not network.charges:
        raise ValueError("the network names no charges: nothing says which modules its gates switch, so nothing can be priced per gate")
    refuse_double_charges(network)
    prices = {}
    for charge in network.charges:
        macs = counts.get(f"network.{charge.module}", 0)
        if macs <= 0:
            raise ValueError(f"module {charge.module!r} is charged to {charge.gates} but ran nothing that costs FLOPs in a dense pass")
        prices[charge.module] = float(macs)
    dense = float(counts[""])
    overhead = float(sum(counts[f"network.{name}"] for name in network.overhead))
    units = {name: gate.score.shape[1] for name, gate in gates.items()}
    height, width = example.shape[2:]
    return FlopsLedger(prices, tuple(network.charges), dense, dense - sum(prices.values()), overhead, (height, width), units)


def refuse_double_charges(network: DynamicNetwork) -> None:
    """Raise if a module is charged twice, or within another charged module: the ledger would add up its price twice."""
    charged: list[str] = []
    for module, gates in network.charges:
        if module in charged:
            raise ValueError(f"module {module!r} is charged twice, the second time to {gates}; name all its gates in one charge")
        charged.append(module)
    for inner in charged:
        for outer in charged:
            if inner.startswith(f"{outer}."):
                raise ValueError(f"module {inner!r} is charged and lies inside {outer!r}, which is charged too; charge one of the two")
