"""The contract of a dynamic network: pixels in, logits and gates out, in every mode.

A *gate* holds the decisions of one optional computation for a batch of images: a score in [0, 1], the threshold it is compared with, and
what was executed. A *charge* says which gates multiply the price of a module. Networks and FLOPs never import each other; they meet here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gatewatt.gating.decide import Decision

Execution = Literal["masked", "dense", "skipped"]
"""How a forward pass treats closed gates.

- ``masked``: every unit runs and is multiplied by its decision; every score exists (training, attacks).
- ``dense``: every gate is open (pricing, the static counterpart).
- ``skipped``: closed units are really not computed, for any batch size (inference, audit, latency).
"""

EXECUTIONS: tuple[Execution, ...] = ("masked", "dense", "skipped")


@dataclass(frozen=True)
class Gate:
    """The decisions of one optional computation for a batch.

    Attributes:
        score: G(x) in [0, 1], differentiable with respect to the image, shape (B, U). At or above ``threshold`` always means "spend".
        threshold: tau on the same scale, broadcastable to (B, U).
        executed: what ran, 0 or 1, shape (B, U). It can be below ``score >= threshold`` where an earlier exit stopped the image.
        follows: name of the gate whose units this one is computed from, one to one, such as a mask dilated for a 3x3 convolution. It is
            charged, but decides nothing of its own: attacks, objectives and gate usage leave it out.
        within: names of all earlier gates that must be open for this one to run, such as the exits before an exit; of one unit each, or of as
            many as this gate. Then ``executed`` is the product along the chain, while ``score`` may ask for more. Empty where the score itself
            never asks for more than can run: a unit that halted keeps the score with which it did.
    """

    score: Tensor
    threshold: Tensor
    executed: Tensor
    follows: str | None = None
    within: tuple[str, ...] = ()

    @property
    def open(self) -> Tensor:
        """Which units their own score asks for, bool (B, U)."""
        return self.score >= self.threshold


class Charge(NamedTuple):
    """One entry of the price law: ``price(module)`` times the usage of each gate named.

    Attributes:
        module: path of the module as in ``network.get_submodule``.
        gates: ``(a,)`` for a block, ``(a, b)`` for the product law (channels in x out), ``(a, a)`` for the square law (attention).
    """

    module: str
    gates: tuple[str, ...]


@runtime_checkable
class PartlyRun(Protocol):
    """A charged module that can compute a part of an image: some positions, channels or tokens.

    Hooks that measure what ran ask it; a module without this method computes whole images, one per row of its first input.
    """

    def extent(self, *inputs: Any) -> tuple[int, int]:
        """Units of work in a call with these inputs, over all images, and units of one whole image."""
        ...


class DynamicOutput(NamedTuple):
    """What a dynamic network returns, whatever the execution.

    Attributes:
        logits: class scores after early exit if any, shape (B, K).
        gates: name -> :class:`Gate`, in execution order.
        exits: logits of every exit, shape (B, E, K), for networks that have several.
        aux: what an objective needs beside the logits, for example ``"ponder"`` of shape (B,); the first axis is the batch.
    """

    logits: Tensor
    gates: Mapping[str, Gate]
    exits: Tensor | None = None
    aux: Mapping[str, Tensor] = MappingProxyType({})


def split_output(output: DynamicOutput, sizes: list[int]) -> list[DynamicOutput]:
    """Cut the output of a concatenated batch back into its parts, along the batch axis.

    Args:
        output: of a batch of ``sum(sizes)`` images.
        sizes: number of images of each part.
    """
    logits = output.logits.split(sizes)
    exits = [None] * len(sizes) if output.exits is None else output.exits.split(sizes)
    gates = {name: (gate, gate.score.split(sizes), gate.executed.split(sizes)) for name, gate in output.gates.items()}
    parts = []
    for index, (part_logits, part_exits) in enumerate(zip(logits, exits, strict=True)):
        part_gates = {name: replace(gate, score=scores[index], executed=executed[index]) for name, (gate, scores, executed) in gates.items()}
        aux = {name: value.split(sizes)[index] for name, value in output.aux.items()}
        parts.append(DynamicOutput(part_logits, part_gates, part_exits, aux))
    return parts


class DynamicNetwork(nn.Module, ABC):
    """A network that decides per image what to compute.

    A subclass sets ``charges`` and ``overhead`` and implements :meth:`forward`. Pixels are in [0, 1]; normalisation is the network's first
    layer. Nothing is parked on ``self`` between forward and loss.

    Attributes:
        charges: which gates multiply the price of which module.
        overhead: paths of the modules that only compute decisions; part of the fixed FLOPs, shown apart.
        executions: those it supports; without ``skipped``, figures are the ledger's alone.
        arguments: what rebuilds the network, ``type(network)(**network.arguments)``; numbers, strings and None only.
        decision: how a score becomes a decision (:mod:`gatewatt.gating.decide`).
    """

    charges: tuple[Charge, ...] = ()
    overhead: tuple[str, ...] = ()
    executions: tuple[Execution, ...] = EXECUTIONS
    arguments: dict[str, Any]
    decision: Decision

    @abstractmethod
    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Classify ``images`` (B, 3, H, W) in [0, 1] and report every gate."""


class GateTable(NamedTuple):
    """All gates of a batch that decide for themselves, side by side, (B, N) each, in execution order."""

    score: Tensor
    threshold: Tensor
    executed: Tensor


def gate_table(gates: Mapping[str, Gate]) -> GateTable:
    """Concatenate gates along the unit axis, those that follow another one left out.

    Args:
        gates: name -> gate, each of shape (B, U).

    Returns:
        Scores, thresholds (expanded) and executed decisions, each of shape (B, N) with N the total number of units.

    Raises:
        ValueError: if there is no gate, so there is nothing to attack, defend or price.

    Example:
        >>> gate = Gate(torch.tensor([[0.7]]), torch.tensor(0.5), torch.tensor([[1.0]]))
        >>> gate_table({"a": gate, "b": gate}).score.shape
        torch.Size([1, 2])
    """
    require_gates(gates)
    deciding = [gate for gate in gates.values() if gate.follows is None]
    return GateTable(
        score=torch.cat([gate.score for gate in deciding], dim=1),
        threshold=torch.cat([gate.threshold.expand_as(gate.score) for gate in deciding], dim=1),
        executed=torch.cat([gate.executed for gate in deciding], dim=1),
    )


def require_gates(gates: Mapping[str, Gate]) -> None:
    """Raise if a network returned no gates."""
    if not gates:
        raise ValueError("the network returned no gates: it computes the same for every image, so there is nothing to attack or to price")


def check_execution(execution: str) -> None:
    """Raise unless ``execution`` is one of :data:`EXECUTIONS`."""
    if execution not in EXECUTIONS:
        raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")


def measuring_execution(network: DynamicNetwork) -> Execution:
    """How a network is measured: ``skipped`` if it can, so that other routes see what ran; else ``masked``, where the ledger alone tells."""
    return "skipped" if "skipped" in network.executions else "masked"
