"""Where one gate of somebody else's model is read, what its score means, and where a decision goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gatewatt.gating.exits import exit_score

ScoreName = Literal["probability", "logit", "softmax2", "confidence"]
WriteName = Literal["auto", "decision", "onehot", "logit", "softmax2"]
SCORES: tuple[ScoreName, ...] = ("probability", "logit", "softmax2", "confidence")
WRITES: tuple[WriteName, ...] = ("auto", "decision", "onehot", "logit", "softmax2")

CERTAIN = 200.0
"""A written logit: its sigmoid and its softmax against the opposite are exactly 0 or 1 in float32, no Gumbel noise turns it, float16 holds it."""


@dataclass(frozen=True)
class GateHook:
    """Where one gate of a model is read, and how it is steered.

    **Reading.** ``score`` says what the module's output (or the element ``select`` of it) is; the result always has shape (B, U), U units
    per image, ``(B,)``, ``(B, U, 1, 1)`` and ``(B, U, H, W)`` being flattened:

    - ``probability``: already in [0, 1];
    - ``logit``: its sigmoid is the score;
    - ``softmax2``: logits or log-probabilities of (skip, run), on axis 1, or on the last axis of (B, U, 2);
    - ``confidence``: class logits (B, K) of an early exit; an image leaves where its largest probability exceeds ``threshold``
      (:func:`~gatewatt.gating.exits.exit_score`). The network picks the logits of the exit taken, so the model must run all its exits.
    - a callable: from the output (or element) to the score.

    **Writing.** A masked pass runs on the network's decisions, so they must get into the model: ``write`` replaces what was read, or the element
    ``into``, or the output of another module ``at`` that is called later (a Gumbel sampler behind the logits). By default it is the inverse
    of ``score``; a mask given by ``at`` or ``into`` receives the decision itself.

    - ``decision``: 0 or 1 with the decision's gradient, in the shape of the element;
    - ``onehot``: the pair (1 - decision, decision), the gradient included;
    - ``logit``, ``softmax2``: a certain logit (pair) for every unit that is to do otherwise than its own score says. What agrees stays as it
      is, so that the model's own rounding and its gradient are kept: it must round, else hook the module behind its sigmoid;
    - a callable from the element and the decision (B, U) to the new element;
    - ``None``: the model always decides by itself, as ``score >= threshold`` says; dense execution is then refused, and with it a price.

    Attributes:
        module: path of the gate module in the model, as in ``model.get_submodule``.
        score: see above.
        threshold: on the score's scale, in (0, 1); for ``confidence`` the confidence itself.
        select: index or key of the element that holds the score, for outputs that are tuples, lists, mappings or objects.
        within: names of earlier gates that must be open for this one to run; ``executed`` is the product along the chain. Its own name chains
            the calls of a gate that fires several times. An exit always lies within the exit before it.
        fires: calls in one forward pass, for a module shared by several blocks; every call is a gate, ``name.0``, ``name.1``, ...
        split: gates in one call, for a policy module that decides for all blocks at once: its units in equal parts, named likewise.
        write: see above.
        at: path of the module whose output the decision replaces; the gate module itself when left out.
        into: index or key of the element that the decision replaces; ``select`` when left out.

    Raises:
        ValueError: for a name, threshold or count that does not exist.

    Example:
        >>> hook = GateHook("layer1.0.gate", score="softmax2", select=1, into=0)  # a module that returns (mask, log-probabilities)
        >>> hook.writes
        'decision'
    """

    module: str
    score: ScoreName | Callable[[Any], Tensor] = field(default="probability", kw_only=True)
    threshold: float = field(default=0.5, kw_only=True)
    select: int | str | None = field(default=None, kw_only=True)
    within: Sequence[str] = field(default=(), kw_only=True)
    fires: int = field(default=1, kw_only=True)
    split: int = field(default=1, kw_only=True)
    write: WriteName | Callable[[Any, Tensor], Any] | None = field(default="auto", kw_only=True)
    at: str | None = field(default=None, kw_only=True)
    into: int | str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.score) and self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, or a callable, got {self.score!r}")
        if self.write is not None and not callable(self.write) and self.write not in WRITES:
            raise ValueError(f"write must be one of {', '.join(WRITES)}, a callable or None, got {self.write!r}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), the scale of the score, got {self.threshold}")
        if self.fires < 1 or self.split < 1:
            raise ValueError(f"fires and split must be at least 1, got {self.fires} and {self.split}")
        # A lone name is a sequence of characters otherwise.
        object.__setattr__(self, "within", (self.within,) if isinstance(self.within, str) else tuple(self.within))

    @property
    def is_exit(self) -> bool:
        """Whether the score is an early exit's confidence."""
        return self.score == "confidence"

    @property
    def writes(self) -> str | Callable[[Any, Tensor], Any] | None:
        """How a decision is written, the default resolved; None if it is not."""
        if self.write != "auto":
            return self.write
        if self.at is not None or self.into not in (None, self.select):
            return "decision"
        if callable(self.score) or self.is_exit:
            return None
        return "decision" if self.score == "probability" else self.score

    @property
    def target(self) -> int | str | None:
        """Index or key of the element that a decision replaces; None for the whole output."""
        return self.select if self.into is None and self.at is None else self.into

    def names(self, name: str) -> list[str]:
        """Names of the gates that this hook gives, in the order of its calls and parts."""
        count = self.fires * self.split
        return [name] if count == 1 else [f"{name}.{index}" for index in range(count)]


def read_score(name: str, hook: GateHook, element: Any) -> Tensor:
    """Turn what a gate module returned into scores (B, U), float32 or better.

    Raises:
        ValueError: if it is no tensor, or has the wrong shape for what it is said to be.
    """
    whose = f"gate {name!r} (module {hook.module!r})"
    raw = hook.score(element) if callable(hook.score) else element
    if not isinstance(raw, Tensor) or raw.ndim == 0:
        raise ValueError(f"{whose}: the score must be a tensor with one row per image, got {described(raw)}; see select and score of GateHook")
    # Decisions in float32: autocast would round a score across its threshold.
    raw = raw if raw.dtype == torch.float64 else raw.float()
    if hook.is_exit:
        if raw.ndim != 2 or raw.shape[1] < 2:
            raise ValueError(f"{whose}: an exit needs class logits of shape (B, K), got {tuple(raw.shape)}")
        return exit_score(raw, hook.threshold)
    if hook.score == "softmax2":
        axis = pair_axis(raw)
        if raw.ndim < 2 or raw.shape[axis] != 2:
            raise ValueError(f"{whose}: softmax2 needs two classes on axis 1, or on the last axis of (B, U, 2), got {tuple(raw.shape)}")
        raw = raw.softmax(axis).select(axis, 1)
    elif hook.score == "logit":
        raw = raw.sigmoid()
    score = raw.flatten(1) if raw.ndim > 1 else raw[:, None]
    if score.shape[1] == 0:
        raise ValueError(f"{whose}: the score has no units, shape {tuple(raw.shape)}")
    return score


def written(name: str, hook: GateHook, target: Any, executed: Tensor, own: Tensor) -> Any:
    """What replaces ``target``, an element of a module's output, so that the model does what was decided.

    Args:
        name: of the gate, for messages.
        hook: how decisions are written.
        target: the element as the model computed it.
        executed: 0 or 1, (B, U).
        own: what the score itself asks for, (B, U).
    """
    form = hook.writes
    if callable(form):
        return form(target, executed)
    pairs = form in ("onehot", "softmax2")
    if not isinstance(target, Tensor) or target.numel() != executed.numel() * (2 if pairs else 1) or len(target) != len(executed):
        wanted = f"{tuple(executed.shape)} decisions" + (" as pairs" if pairs else "")
        raise ValueError(f"gate {name!r}: {wanted} cannot be written as {form!r} into {described(target)}; give GateHook a write of your own")
    if form == "decision":
        return executed.to(target.dtype).reshape(target.shape)
    if form == "onehot":
        return as_pairs(1 - executed, executed, target)
    obeyed, logit = executed.detach() == own, CERTAIN * (2 * executed.detach() - 1)
    if form == "logit":
        return torch.where(obeyed.reshape(target.shape), target, logit.to(target.dtype).reshape(target.shape))
    return torch.where(as_pairs(obeyed, obeyed, target).bool(), target, as_pairs(-logit, logit, target))


def pair_axis(values: Tensor) -> int:
    """Axis of (skip, run): the last of three, else axis 1."""
    return 2 if values.ndim == 3 else 1


def as_pairs(first: Tensor, second: Tensor, like: Tensor) -> Tensor:
    """Two tensors (B, U) side by side in shape and dtype of ``like``."""
    axis = pair_axis(like)
    return torch.cat([first.unsqueeze(axis), second.unsqueeze(axis)], dim=axis).to(like.dtype).reshape(like.shape)


def pick(value: Any, key: int | str | Callable[[Any], Any] | None, whose: str, argument: str) -> Any:
    """An element of ``value``: by index or key, by attribute where it is no mapping, by a function, or all of it for None."""
    if key is None:
        return value
    if callable(key):
        return key(value)
    try:
        return getattr(value, key) if isinstance(key, str) and not isinstance(value, Mapping) else value[key]
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ValueError(f"{whose} has no element {key!r} ({argument}): it is {described(value)}") from None


def put(value: Any, key: int | str | None, element: Any) -> Any:
    """``value`` with one element replaced; a copy, since the model's own may be kept elsewhere."""
    if key is None:
        return element
    if isinstance(value, tuple):
        if isinstance(key, str):
            return value._replace(**{key: element})  # type: ignore[attr-defined]
        items = [*value]
        items[key] = element
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    copied = copy.copy(value)
    if isinstance(key, str) and not isinstance(value, Mapping):
        setattr(copied, key, element)
    else:
        copied[key] = element
    return copied


def described(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"a mapping with keys {', '.join(map(str, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a value of type {type(value).__name__}"
