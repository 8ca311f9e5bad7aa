"""Taking up an interrupted run: which checkpoint, whether it fits, and what the command line has to say about it."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule

from gatewatt.callbacks.saving import AtomicCheckpointIO, verify

RECORD = "gatewatt"  # the key of a checkpoint that says which network and settings it belongs to
COMPARED = ("seed_everything", "model", "data")  # groups of a recipe that determine what a step does
LENGTH = ("trainer.max_epochs", "trainer.max_steps", "trainer.limit_train_batches", "trainer.accumulate_grad_batches")


class Resumable(NamedTuple):
    """A checkpoint that a run can go on from, and the optimiser steps done by then."""

    path: Path
    step: int


def say(line: str) -> None:
    """One line for the user, apart from what the run prints."""
    print(f"gatewatt: {line}", file=sys.stderr)


def last_checkpoint(folder: Path, *, tell: bool = True) -> Resumable | None:
    """The most advanced sound checkpoint anywhere in a run's folder, or None.

    Args:
        folder: the run's folder; it need not exist.
        tell: say of each damaged checkpoint that it is passed over.
    """
    found = []
    for path in folder.rglob("*.ckpt"):
        try:
            # On the meta device only the plain values are read.
            content = torch.load(path, map_location="meta", weights_only=True, mmap=True)
            ended = content["loops"]["fit_loop"]["epoch_progress"]["total"]["processed"]
            # Of two at one step, the one after the epoch's end knows of its validation.
            found.append(((content["global_step"], ended, path.stat().st_mtime_ns), path))
        # Whatever is wrong with a file, there may be another one.
        except Exception:
            if tell:
                say(f"{path} cannot be read and is passed over")
    for (step, _, _), path in sorted(found, reverse=True):
        try:
            with path.open("rb") as stream:
                verify(stream, path)
        except (OSError, ValueError) as error:
            if tell:
                say(f"{str(error).split(';')[0]}; it is passed over")
        else:
            return Resumable(path, step)
    return None


def result_of(folder: Path) -> dict[str, Any] | None:
    """What a complete run says of itself, or None."""
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("verb") == "fit" else None


def described(task: LightningModule) -> dict[str, Any] | None:
    """The network of a task as plain values."""
    network = getattr(task, "network", None)
    arguments = getattr(network, "arguments", None)
    return None if arguments is None else {"name": type(network).__name__, "arguments": dict(arguments)}


def record(task: LightningModule, settings: dict[str, Any], processes: int) -> str:
    """What a checkpoint keeps to be recognised by."""
    return json.dumps({"network": described(task), "settings": settings, "processes": processes}, default=str)


def recorded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What :func:`record` put into a checkpoint; nothing where Lightning alone wrote it."""
    return json.loads(checkpoint[RECORD]) if isinstance(checkpoint.get(RECORD), str) else {}


def check_fit(path: Path, task: LightningModule, settings: dict[str, Any], *, training: bool) -> None:
    """Refuse a training checkpoint that is not this task's, and say what else differs.

    Lightning restores optimiser and schedule with the rates they had, so a rate given here would be ignored in silence: that is refused too.

    Args:
        path: the checkpoint.
        task: the task as the recipe and the flags made it.
        settings: the resolved recipe.
        training: whether the optimiser is restored.

    Raises:
        ValueError: in one line.
    """
    content = AtomicCheckpointIO().load_checkpoint(path, map_location="meta")
    kept = recorded(content)
    network = described(task)
    if kept.get("network") is not None and network is not None and kept["network"] != json.loads(json.dumps(network, default=str)):
        raise ValueError(f"{path} is of another network: {told(kept['network'])}, here it is {told(network)}; choose another --run or recipe")
    compare_states(path, content["state_dict"], task)
    if not training:
        return
    differing = dict(differences(kept.get("settings") or settings, settings))
    fixed = [key for key in differing if ".optimization." in key]
    if fixed:
        old, new = differing[fixed[0]]
        name = fixed[0].replace(".init_args", "")
        raise ValueError(
            f"{name} is {new} here and {old} in {path}, which restores its optimiser and schedule; give --{name} {old}, "
            "or start a new run from the weights with model.checkpoint"
        )
    rest = [f"{key.replace('.init_args', '')} {new} (was {old})" for key, (old, new) in differing.items() if "network" not in key.split(".")]
    if rest:
        more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
        say(f"going on with other settings than before: {', '.join(rest[:3])}{more}")


def told(network: dict[str, Any]) -> str:
    """A network in a few words."""
    return f"{network['name']}({', '.join(f'{key}={value}' for key, value in network['arguments'].items())})"


def compare_states(path: Path, stored: dict[str, torch.Tensor], task: LightningModule) -> None:
    """Raise unless a checkpoint holds exactly the tensors of the task."""
    wanted = task.state_dict()
    for complaint, names in (("lacks", wanted.keys() - stored.keys()), ("holds what is not there", stored.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{path} is not of this task and network: it {complaint}: {few(sorted(names))}")
    misshapen = [name for name, tensor in wanted.items() if stored[name].shape != tensor.shape]
    if misshapen:
        first = misshapen[0]
        shapes = f"{tuple(stored[first].shape)} there, {tuple(wanted[first].shape)} here"
        raise ValueError(f"{path} is of another network: {few(misshapen)} differ in shape ({first}: {shapes})")


def few(names: Sequence[str], limit: int = 3) -> str:
    """The first names, and how many more there are.

    Example:
        >>> few(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def differences(old: dict[str, Any], new: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Fields that determine training and differ between two resolved recipes: key -> (old, new)."""
    flat = [dict(fields(settings)) for settings in (old, new)]
    for key in sorted(flat[0].keys() | flat[1].keys()):
        before, after = flat[0].get(key), flat[1].get(key)
        if before != after and (key.split(".")[0] in COMPARED or key in LENGTH):
            yield key, (before, after)


def fields(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every plain value of a document with its dotted key."""
    if isinstance(value, dict):
        for name, below in value.items():
            yield from fields(below, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from fields(below, f"{key}.{index}")
    else:
        yield key, value


def resuming_command(command: Sequence[str], checkpoint: Path, *, automatic: bool = False) -> str:
    """The command that takes up a run that ``command`` started.

    Args:
        command: verb and arguments as they were given.
        checkpoint: where to go on from.
        automatic: whether the run resumes by itself, so that the command as it was is the one.

    Example:
        >>> resuming_command(["fit", "-c", "a.yaml", "--ckpt_path", "old.ckpt"], Path("runs/a/interrupted.ckpt"))
        'gatewatt fit -c a.yaml --ckpt_path runs/a/interrupted.ckpt'
    """
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word == "--ckpt_path":
            next(words, None)
        elif not word.startswith("--ckpt_path="):
            kept.append(word)
    return shlex.join(["gatewatt", *kept] if automatic else ["gatewatt", *kept, "--ckpt_path", str(checkpoint)])
