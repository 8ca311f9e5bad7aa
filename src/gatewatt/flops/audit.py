"""The proof: independent routes to the FLOPs of a forward pass that really skipped.

Four routes must agree to the last FLOP: the ledger; an fvcore trace of a skipped pass (:func:`audit`); torch's dispatcher counter on the same
pass (:func:`audit_dispatched`); and forward hooks on the optional modules (:class:`ExecutionMeter`), which add rows times price when a
module is really called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from gatewatt.flops.handles import analyse
from gatewatt.flops.ledger import FlopsLedger
from gatewatt.flops.pricing import Traceable, measuring
from gatewatt.gating import DynamicNetwork, PartlyRun, check_finite, check_images, forced


def audit(network: DynamicNetwork, images: Tensor) -> int:
    """FLOPs of a really skipped pass, by an fvcore trace of that very pass.

    Args:
        network: any dynamic network that supports ``skipped`` execution.
        images: one image (1, 3, H, W) in [0, 1], or a batch, whose FLOPs are added up.

    Returns:
        MACs (1 MAC = 1 FLOP), gates included.
    """
    check_images(images)
    with measuring(network):
        return int(analyse(Traceable(network, "skipped"), (images,)).total())


def audit_dispatched(network: DynamicNetwork, images: Tensor) -> int:
    """The same pass, counted by torch's ``FlopCounterMode`` on the operators really dispatched; it counts 2 per MAC."""
    check_images(images)
    # The fused encoder path of torch.nn.MultiheadAttention bypasses the dispatcher, and its FLOPs with it.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with measuring(network), FlopCounterMode(display=False) as counter:
            network(images, "skipped")
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    total, remainder = divmod(counter.get_total_flops(), 2)
    if remainder:
        raise RuntimeError(f"FlopCounterMode counted an odd number of FLOPs ({2 * total + 1}); it should count 2 per MAC")
    return total


class ExecutionMeter:
    """Forward hooks, one per charged module, that add up what really ran: rows times the module's price.

    Independent of the gates: a module that is not called, or called on fewer images, adds less. One that computes parts of images says how
    much of them (:class:`~gatewatt.gating.PartlyRun`). In masked or dense execution every module
    runs for every image, and the meter says so.

    Args:
        network: the network to watch.
        ledger: its price list.

    It can be entered again and again (around the forwards that are to be measured, and only those) and adds up until :meth:`reset`.

    Attributes:
        flops: module -> MACs executed inside.
        images: rows that entered the network inside.

    Example:
        >>> from gatewatt.flops import price
        >>> from gatewatt.networks import SkipNet
        >>> network, images = SkipNet(depth=8, width=4).eval(), torch.rand(2, 3, 32, 32)
        >>> with ExecutionMeter(network, price(network, images[:1])) as meter:
        ...     output = network(images, "skipped")
        >>> meter.total == price(network, images[:1])(output.gates).sum().item()
        True
    """

    def __init__(self, network: DynamicNetwork, ledger: FlopsLedger) -> None:
        self.network, self.ledger = network, ledger
        self.reset()
        self._handles: list[RemovableHandle] = []

    def reset(self) -> None:
        """Start from zero."""
        self.flops: dict[str, float] = dict.fromkeys(self.ledger.prices, 0.0)
        self.images = 0

    def __enter__(self) -> ExecutionMeter:
        self._handles = [self.network.register_forward_pre_hook(self._count_images)]
        for name in self.ledger.prices:
            self._handles.append(self.network.get_submodule(name).register_forward_hook(self._charge(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    @property
    def total(self) -> float:
        """MACs executed inside: optional modules as they ran, plus the fixed part of every image."""
        return self.images * self.ledger.fixed + sum(self.flops.values())

    def _count_images(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.images += len(inputs[0])

    def _charge(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            ran, whole = module.extent(*inputs) if isinstance(module, PartlyRun) else (len(inputs[0]), 1)
            # Multiply first, divide last: whole numbers of MACs stay whole.
            self.flops[name] += self.ledger.prices[name] * ran / whole

        return hook


class Routes(NamedTuple):
    """FLOPs of one skipped pass by four independent routes, in MACs summed over the batch, and the largest logit difference."""

    ledger: float
    traced: int
    dispatched: int
    hooked: float
    logit_difference: float

    @property
    def agree(self) -> bool:
        """Whether all four are the same number and masked logits equal skipped logits to 1e-4 relative."""
        return self.ledger == self.traced == self.dispatched == self.hooked and self.logit_difference <= 1e-4


def compare_routes(network: DynamicNetwork, images: Tensor, ledger: FlopsLedger, pattern: Mapping[str, Tensor] | None = None) -> Routes:
    """Measure one batch by all four routes, and masked against skipped logits.

    Args:
        network: the network to prove.
        images: batch (B, 3, H, W) in [0, 1].
        ledger: its price list.
        pattern: gate name -> decisions (B, U) to force; ``None`` lets the gates decide.

    Returns:
        The four totals over the batch, and the largest difference of logits relative to the largest logit.
    """
    if pattern is not None:
        with forced(network, pattern):
            return compare_routes(network, images, ledger)
    with measuring(network):
        masked = network(images, "masked")
        with ExecutionMeter(network, ledger) as meter:
            skipped = network(images, "skipped")
    check_finite(skipped)
    difference = (masked.logits - skipped.logits).abs().max() / skipped.logits.abs().max().clamp_min(1e-12)
    return Routes(ledger(skipped.gates).sum().item(), audit(network, images), audit_dispatched(network, images), meter.total, difference.item())


def random_patterns(network: DynamicNetwork, images: Tensor, count: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """``count`` random decisions for every gate, each with its own share of open units, for forced audits.

    Args:
        network: the network whose gates are to be forced.
        images: the batch the patterns are for.
        count: how many patterns.
        seed: seed of the draw; the global generator is left alone.
    """
    with measuring(network):
        shapes = {name: gate.score.shape for name, gate in network(images, "dense").gates.items() if gate.follows is None}
    generator = torch.Generator().manual_seed(seed)
    patterns = []
    for _ in range(count):
        share = torch.rand((), generator=generator)
        patterns.append({name: (torch.rand(shape, generator=generator) < share).float() for name, shape in shapes.items()})
    return patterns
