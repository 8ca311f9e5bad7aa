"""Bring your own network: forward hooks turn the gate modules of any ``nn.Module`` into gates; its code stays as it is.

A :class:`GateHook` says where a score is read, what it means, and where a decision goes when somebody else than the model decides (dense
execution, forced patterns, sampling). A :class:`HookedNetwork` puts such hooks around one forward pass and returns what every dynamic network
returns, so that it can be priced, attacked, defended and measured.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gatewatt.gating.decide import decision_named, hard, straight_through
from gatewatt.gating.gate import Charge, DynamicNetwork, DynamicOutput, Execution, Gate, check_execution
from gatewatt.gating.gate_hook import GateHook, described, pick, put, read_score, written


class HookedNetwork(DynamicNetwork):
    """A gated model of any make as a dynamic network.

    Hooks live during a forward pass only, and what they saw goes out with its result. (Each hooked module keeps one hook that does nothing:
    it tells attacks not to fold the module into its neighbour.) Activation checkpointing around a gate is not supported: it would run
    the gate again without its hook.

    Args:
        model: the network. It maps its input to class logits, or to something that ``logits`` finds them in.
        gates: name -> hook, in execution order.
        charges: which gates multiply the price of which module of the model, as :class:`Charge` or (path, gate or gates).
        num_classes: classes K.
        normalize: what happens to pixels in [0, 1] before the model sees them: a module or function; nothing when left out.
        logits: index, key or function that finds the logits (B, K) in the model's output; the output itself when left out. Of a model with
            early exits, its last logits.
        skipped: how the model skips for real, so that FLOPs can be audited and latency measured: a function of model and (normalised)
            images, or the name of a method of the model (``"forward"`` if it skips as it is). It takes any batch and returns what
            the model returns, exits already taken, and calls a gate module for all images or for those alone that the gates it lies ``within``
            left open, in their order. Without it skipped execution is refused; FLOPs are then the ledger's, of masked passes.
        overhead: modules of the model that only compute decisions; the hooked gate modules that are not charged when left out.
        decision: ``straight_through``, ``sampled`` or ``hard``.

    Raises:
        ValueError: for a module or gate that does not exist; in a forward pass, for a gate that did not fire or fired too often, a score of the
            wrong shape or outside [0, 1], and an execution or decision that cannot be imposed.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate, self.block, self.head = nn.Linear(3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 10)
        ...
        ...     def forward(self, x):
        ...         keep = self.gate(x.mean((2, 3))) > 0
        ...         return self.head((x + keep[:, :, None, None] * self.block(x)).mean((2, 3)))
        >>> network = HookedNetwork(Model(), {"gate": GateHook("gate", score="logit")}, [("block", "gate")], num_classes=10)
        >>> network(torch.rand(2, 3, 8, 8)).gates["gate"].score.shape
        torch.Size([2, 1])
    """

    executions: tuple[Execution, ...]
    thresholds: Tensor

    def __init__(
        self,
        model: nn.Module,
        gates: Mapping[str, GateHook],
        charges: Sequence[tuple[str, str | Sequence[str]]],
        *,
        num_classes: int,
        normalize: Callable[[Tensor], Tensor] | None = None,
        logits: int | str | Callable[[Any], Tensor] | None = None,
        skipped: str | Callable[[nn.Module, Tensor], Any] | None = None,
        overhead: Sequence[str] | None = None,
        decision: Literal["straight_through", "sampled", "hard"] = "straight_through",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        self.model, self.hooks, self.normalize = model, dict(gates), normalize
        self.logits, self.skipped, self.num_classes = logits, skipped, num_classes
        if isinstance(skipped, str) and not callable(getattr(model, skipped, None)):
            raise ValueError(f"skipped: {type(model).__name__} has no method {skipped!r}")
        self.executions = ("masked", "dense") if skipped is None else ("masked", "dense", "skipped")
        self.decision = decision_named(decision)
        self.outer = nesting(self.hooks)
        self.enclosing = enclosing(self.outer)
        # An exit's score is 0.5 at its confidence, whatever that is.
        levels = [0.5 if hook.is_exit else hook.threshold for hook in self.hooks.values()]
        self.register_buffer("thresholds", torch.tensor(levels), persistent=False)
        for name, hook in self.hooks.items():
            for path in (hook.module,) if hook.at is None else (hook.module, hook.at):
                mark(find(model, path, f"gate {name!r}"))
        self._refuse_shared_reading()
        self.charges = tuple(Charge(f"model.{module}", (names,) if isinstance(names, str) else tuple(names)) for module, names in charges)
        for module, names in self.charges:
            find(model, module.removeprefix("model."), f"the charge of {', '.join(names)}")
            for gate in names:
                if gate not in self.outer:
                    raise ValueError(f"module {module.removeprefix('model.')!r} is charged to {gate!r}, which is no gate{near(gate, self.outer)}")
        if overhead is not None:
            for path in overhead:
                find(model, path, "overhead")
        self.overhead = tuple(f"model.{path}" for path in (self._uncharged_gates() if overhead is None else overhead))
        self.arguments = {
            "model": type(model).__name__,
            "num_classes": num_classes,
            "decision": decision,
            "gates": len(self.outer),
            "skips": skipped is not None,
        }

    def forward(self, images: Tensor, execution: Execution = "masked") -> DynamicOutput:
        """Logits (B, K) and the gates in the order given.

        With exits: of the exit taken, and the logits of all of them, (B, E, K), the model's own last; None where a skipping forward chose.
        """
        check_execution(execution)
        if execution not in self.executions:
            raise ValueError(
                f"{type(self.model).__name__} cannot be run skipped: HookedNetwork was given no skipping forward (skipped=...), so nothing "
                "can be audited or timed; masked passes and the ledger give the FLOPs all the same"
            )
        seen = _Pass(self, len(images), execution)
        with seen.hooked():
            output = self._run(images if self.normalize is None else self.normalize(images), execution)
        gates = seen.gates()
        scores = [gate.score for gate in gates.values()]
        if torch.is_grad_enabled() and images.requires_grad and scores and not any(score.requires_grad for score in scores):
            raise ValueError("no gate passes a gradient to the image: hook the modules before their scores are rounded or detached")
        logits = pick(output, self.logits, f"the output of {type(self.model).__name__}", "logits")
        if not isinstance(logits, Tensor) or logits.shape != (len(images), self.num_classes):
            raise ValueError(f"the logits must be a tensor of shape {(len(images), self.num_classes)}, got {described(logits)}; see logits=...")
        exits = None
        # A skipping forward has left at the exits itself.
        if seen.exits and execution != "skipped":
            exits = torch.stack([*(at_exit.to(logits.dtype) for _, at_exit in seen.exits), logits], dim=1)
            for index, (went_on, _) in reversed(list(enumerate(seen.exits))):
                logits = torch.lerp(exits[:, index], logits, went_on.to(logits.dtype))
        return DynamicOutput(logits, gates, exits)

    def _run(self, pixels: Tensor, execution: Execution) -> Any:
        if execution != "skipped":
            return self.model(pixels)
        return getattr(self.model, self.skipped)(pixels) if isinstance(self.skipped, str) else self.skipped(self.model, pixels)  # type: ignore[misc]

    def _refuse_shared_reading(self) -> None:
        read: dict[tuple[str, int | str | None], str] = {}
        for name, hook in self.hooks.items():
            other = read.setdefault((hook.module, hook.select), name)
            if other != name and not (callable(hook.score) and callable(self.hooks[other].score)):
                raise ValueError(
                    f"gates {other!r} and {name!r} read the same output of module {hook.module!r}; one hook with split gives several gates"
                )

    def _uncharged_gates(self) -> list[str]:
        """Paths of gate modules that neither hold nor lie in a charged module or another gate module."""
        charged = [charge.module.removeprefix("model.") for charge in self.charges]
        paths = list(dict.fromkeys(hook.module for hook in self.hooks.values()))
        free = [path for path in paths if not any(inside(path, module) or inside(module, path) for module in charged)]
        return [path for path in free if not any(path != other and inside(path, other) for other in free)]


class _Fired(NamedTuple):
    """One gate in one pass: score, threshold, the decision (B, U) with its gradient, and executed, the same where the gates around it are open."""

    score: Tensor
    threshold: Tensor
    asked: Tensor
    executed: Tensor


class _Pass:
    """The hooks of one forward pass and what they saw; it ends with the pass."""

    def __init__(self, network: HookedNetwork, batch: int, execution: Execution) -> None:
        self.network, self.batch, self.execution = network, batch, execution
        self.fired: dict[str, _Fired] = {}
        self.exits: list[tuple[Tensor, Tensor]] = []  # of every exit, whether images that came to it went on (B, 1), and logits (B, K)
        self.passed: set[str] = set()  # the exits so far and the gates around them
        self.calls: Counter[str] = Counter()
        self.pending: defaultdict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Forward hooks within the block."""
        handles = []
        try:
            for name, hook in self.network.hooks.items():
                gate = self.network.model.get_submodule(hook.module)
                handles.append(gate.register_forward_hook(partial(self.read, name)))
                if hook.at is not None:
                    handles.append(self.network.model.get_submodule(hook.at).register_forward_hook(partial(self.write, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def read(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Take a gate module's output, decide, and hand the decision back in its place."""
        hook, call = self.network.hooks[name], self.calls[name]
        self.calls[name] += 1
        if call == hook.fires:
            raise ValueError(
                f"gate {name!r} fired again: module {hook.module!r} was called more than {hook.fires} time(s) in one forward pass; "
                "set fires to the number of its calls"
            )
        element = pick(output, hook.select, f"the output of gate {name!r} (module {hook.module!r})", "select")
        score = read_score(name, hook, element)
        if score.shape[1] % hook.split:
            raise ValueError(f"gate {name!r} has {score.shape[1]} units, which do not split into {hook.split} equal parts")
        gates = hook.names(name)[call * hook.split : (call + 1) * hook.split]
        decided = [self.decide(gate, name, part) for gate, part in zip(gates, score.split(score.shape[1] // hook.split, dim=1), strict=True)]
        if hook.is_exit:
            self.exits.append((self.went_on(gates[0]), element))
        if hook.writes is None:
            return None
        executed, own = (torch.cat(parts, dim=1) for parts in zip(*decided, strict=True))
        if hook.at is not None:
            self.pending[name].append((executed, own))
            return None
        target = pick(output, hook.target, f"the output of gate {name!r} (module {hook.module!r})", "into")
        return put(output, hook.target, written(name, hook, target, executed, own))

    def write(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Replace the output of a module behind the gate by the decision that waits for it."""
        hook = self.network.hooks[name]
        if not self.pending[name]:
            raise ValueError(f"module {hook.at!r} was called before gate {name!r} decided, or more often: its decision cannot be written there")
        executed, own = self.pending[name].pop(0)
        target = pick(output, hook.target, f"the output of module {hook.at!r}, where gate {name!r} is written,", "into")
        return put(output, hook.target, written(name, hook, target, executed, own))

    def decide(self, gate: str, name: str, score: Tensor) -> tuple[Tensor, Tensor]:
        """Decide one gate; returns what it executes and what its own score asks for, for the images that ``score`` holds."""
        network, hook = self.network, self.network.hooks[name]
        outer = self.outer(gate)
        rows = None
        if len(score) != self.batch:
            if self.execution != "skipped" or outer is None:
                raise ValueError(f"gate {name!r}: the score has shape {tuple(score.shape)}, but there are {self.batch} images; it must be (B, U)")
            rows = outer.detach().any(dim=1).nonzero().flatten()
            if len(score) != len(rows):
                raise ValueError(f"gate {name!r} saw {len(score)} images, but {len(rows)} of {self.batch} had the gates open that it lies within")
            score = self.inherited(gate, score.shape[1]).index_copy(0, rows, score)
        if outer is not None and outer.shape[1] not in (1, score.shape[1]):
            raise ValueError(f"gate {gate!r} has {score.shape[1]} units and lies within gates of {outer.shape[1]}; both must be equal, or one unit")
        threshold = self.threshold(name)
        own = hard(gate, score.detach(), threshold, training=network.training)
        asked = torch.ones_like(score) if self.execution == "dense" else network.decision(gate, score, threshold, training=network.training)
        # The network itself picks the logits of the exit taken, unless the model has left there already.
        if hook.writes is None and not (hook.is_exit and self.execution != "skipped"):
            if self.execution == "dense":
                raise ValueError(f"gate {name!r} cannot be held open: dense execution and prices need GateHook(..., write=...)")
            if network.decision not in (hard, straight_through) and bool((asked.detach() != own).any()):
                raise ValueError(f"gate {name!r} decides by itself: forced and sampled decisions need GateHook(..., write=...)")
        executed = asked if outer is None else asked * outer
        self.fired[gate] = _Fired(score, threshold, asked, executed)
        return (executed, own) if rows is None else (executed[rows], own[rows])

    def outer(self, gate: str) -> Tensor | None:
        """Product of the decisions of all gates around ``gate``, (B, U); None if it lies within none."""
        for around in self.network.outer[gate]:
            if around not in self.fired:
                if self.execution != "skipped":
                    raise ValueError(f"gate {gate!r} fired before gate {around!r}, which it lies within")
                self.settle(around)
        # Each decision once. What two gates around it executed may hold the decision of a third, whose gradient would count twice.
        decisions = [self.fired[around].asked for around in self.network.enclosing[gate]]
        return reduce(torch.mul, decisions) if decisions else None

    def went_on(self, gate: str) -> Tensor:
        """Whether images went on at an exit, (B, 1), provided that they came to it."""
        # Not what it executed: the exits before it choose among the logits themselves, and their decisions would count twice.
        chain = [name for name in (*self.network.enclosing[gate], gate) if name not in self.passed]
        self.passed.update(chain)
        return reduce(torch.mul, [self.fired[name].asked for name in chain])

    def settle(self, gate: str) -> None:
        """In a skipping forward, close a gate that no image reached."""
        name = next(name for name, hook in self.network.hooks.items() if gate in hook.names(name))
        outer = self.outer(gate)
        if self.execution != "skipped" or outer is None or bool(outer.detach().any()):
            hook = self.network.hooks[name]
            left = " If the model left at an exit, let it run all of them." if any(other.is_exit for other in self.network.hooks.values()) else ""
            raise ValueError(
                f"gate {gate!r} did not fire: module {hook.module!r} was called {self.calls[name]} time(s) in a {self.execution} pass, "
                f"and {hook.fires} are expected.{left}"
            )
        score = self.inherited(gate, outer.shape[1])
        closed = torch.zeros_like(score)
        self.fired[gate] = _Fired(score, self.threshold(name), closed, closed)

    def threshold(self, name: str) -> Tensor:
        """Threshold of a hook's gates, a scalar."""
        return self.network.thresholds[list(self.network.hooks).index(name)]

    def inherited(self, gate: str, units: int) -> Tensor:
        """For images that never reached a gate: the score of the gate around it, (B, units)."""
        around = self.fired[self.network.outer[gate][-1]].score
        return around.expand(-1, units) if around.shape[1] in (1, units) else around.mean(1, keepdim=True).expand(-1, units)

    def gates(self) -> dict[str, Gate]:
        """All gates after the pass."""
        for name, hook in self.network.hooks.items():
            for gate in hook.names(name):
                if gate not in self.fired:
                    self.settle(gate)
            if self.pending[name] and self.execution != "skipped":
                raise ValueError(f"the decision of gate {name!r} was not written: module {hook.at!r} was not called after it")
        self.refuse_out_of_range()
        ordered = {gate: self.fired[gate] for gate in self.network.outer}
        around = self.network.enclosing
        return {gate: Gate(fired.score, fired.threshold, fired.executed.detach(), within=around[gate]) for gate, fired in ordered.items()}

    def refuse_out_of_range(self) -> None:
        """Raise for scores outside [0, 1]; NaN is told apart by whoever records."""
        # Logits and confidences cannot leave the range. One look at the device for all gates.
        given = [name for name, hook in self.network.hooks.items() if callable(hook.score) or hook.score == "probability"]
        scores = {gate: self.fired[gate].score.detach() for name in given for gate in self.network.hooks[name].names(name)}
        if not scores:
            return
        wrong = torch.stack([((score < 0) | (score > 1)).any() for score in scores.values()]).tolist()
        for (gate, score), outside in zip(scores.items(), wrong, strict=True):
            if outside:
                low, high = score.aminmax()
                raise ValueError(f"gate {gate!r}: the score must be in [0, 1], got {low.item():g} to {high.item():g}; see GateHook(score=...)")


def nesting(hooks: Mapping[str, GateHook]) -> dict[str, tuple[str, ...]]:
    """Every gate and the gates that it lies within, in the order of the hooks.

    Raises:
        ValueError: if there is no hook, two gates share a name, or a gate lies within one that does not come before it.

    Example:
        >>> nesting({"exit": GateHook("head", score="confidence", fires=2), "block": GateHook("gate", within="exit.0")})
        {'exit.0': (), 'exit.1': ('exit.0',), 'block': ('exit.0',)}
    """
    if not hooks:
        raise ValueError("gates must name at least one gate: without, the model computes the same for every image")
    known: dict[str, tuple[str, ...]] = {}
    last_exit: tuple[str, ...] = ()
    for name, hook in hooks.items():
        names = hook.names(name)
        for index, gate in enumerate(names):
            if gate in known:
                raise ValueError(f"two gates are named {gate!r}")
            around: list[str] = []
            for other in hook.within:
                if other == name and hook.fires > 1:
                    around += names[index - hook.split : index - hook.split + 1] if index >= hook.split else []
                elif other in known:
                    around.append(other)
                else:
                    raise ValueError(f"gate {gate!r} lies within {other!r}, which is no gate before it{near(other, known)}")
            known[gate] = tuple(dict.fromkeys([*around, *(last_exit if hook.is_exit else ())]))
            last_exit = (gate,) if hook.is_exit else last_exit
    return known


def enclosing(outer: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Every gate and all gates around it, those around these included, each once.

    Args:
        outer: gate -> the gates it lies within, as :func:`nesting` has them.

    Example:
        >>> enclosing({"exit": (), "block": ("exit",), "channel": ("exit", "block")})
        {'exit': (), 'block': ('exit',), 'channel': ('exit', 'block')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for gate, around in outer.items():
        found[gate] = tuple(dict.fromkeys(other for near in around for other in (*found[near], near)))
    return found


def find(model: nn.Module, path: str, whose: str) -> nn.Module:
    """The submodule of that path.

    Raises:
        ValueError: if there is none, naming the closest path.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not path or path not in modules:
        raise ValueError(f"{whose}: {type(model).__name__} has no module {path!r}{near(path, filter(None, modules))}")
    return modules[path]


def near(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that may have been meant."""
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def inside(path: str, outer: str) -> bool:
    """Whether a module path is ``outer`` or lies in it."""
    return path == outer or path.startswith(f"{outer}.")


def idle(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    """Do nothing: a module with a hook is never folded into its neighbour, and so keeps the output that a gate is read from."""


def mark(module: nn.Module) -> None:
    """Leave :func:`idle` on a module, once."""
    if idle not in module._forward_hooks.values():
        module.register_forward_hook(idle)
