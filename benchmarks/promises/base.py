"""What the promises share: outcomes, processes that can be killed, and the smallest run that trains adversarially."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]

TRAINING = """\
model:
  class_path: gatewatt.tasks.EnergyAdversarialTraining
  init_args:
    network:
      class_path: gatewatt.networks.SkipNet
      init_args: {depth: 8, num_classes: 10, width: 4, decision: sampled}
    attack:
      class_path: gatewatt.attacks.GradMDM
      init_args: {steps: 2, warmup: 0.5, lr: 0.05}
    warmup_epochs: 1
    optimization:
      class_path: gatewatt.tasks.Optimization
      init_args: {lr: 0.05, schedule: one_cycle}
data:
  class_path: gatewatt.data.DigitsData
  init_args: {batch_size: 16, val_images: 40, val_subset: 20, eval_batch_size: 10}
trainer:
  max_epochs: 3
  limit_train_batches: 6
  log_every_n_steps: 1
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  num_sanity_val_steps: 0
  callbacks:
    - class_path: gatewatt.callbacks.RecoveryCallback
      init_args:
        images: 10
        attack:
          class_path: gatewatt.attacks.GradMDM
          init_args: {steps: 2}
    - class_path: gatewatt.callbacks.ExportCheckpoint
      init_args: {name: skipnet-8-digits}
    - class_path: gatewatt.callbacks.saving.LastCheckpoint
      init_args: {every: 2}
"""
"""Energy-adversarial training with a warm-up, sampled decisions, augmentation, validation under attack, a checkpoint every other step, and an export:
everything that a resumed run could get wrong."""


class Outcome(NamedTuple):
    """What came out of a promise.

    Attributes:
        held: how often it held.
        of: how often it was put to the test.
        note: figures worth keeping, in one line.
        failures: what went wrong, one line each.
        missing: what is promised and cannot be put to the test here; empty where nothing is missing.
    """

    held: int
    of: int
    note: str = ""
    failures: tuple[str, ...] = ()
    missing: str = ""

    @property
    def kept(self) -> bool:
        """Whether it held every time."""
        return self.held == self.of > 0 and not self.failures


class NotMeasured(Exception):
    """A promise cannot be put to the test here; the message says what is missing."""


def tally(results: Sequence[str | None], note: str = "", *, missing: str = "") -> Outcome:
    """An outcome from one entry per trial: None where the promise held, otherwise what went wrong."""
    failures = tuple(result for result in results if result is not None)
    return Outcome(len(results) - len(failures), len(results), note, failures, missing)


# ---- processes ----


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: this source tree, one thread, and nothing of an earlier run."""
    kept = {key: value for key, value in os.environ.items() if key not in ("GATEWATT_RUN_FOLDER", "GATEWATT_TRACEBACK", "PYTHONWARNINGS")}
    kept |= {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return kept | changes


def gatewatt(arguments: Sequence[str], folder: Path, *, timeout: float = 600, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command, as a user starts it, in a folder."""
    command = [sys.executable, "-m", "gatewatt", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(**changes), capture_output=True, text=True, timeout=timeout, check=False)


def _server() -> Any:
    """Where processes come from: a server that has imported everything once, so that a new process costs no imports."""
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.promises.warm"])
    return context


def _redirect(log: Path) -> None:
    """Send everything that this process prints to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _command(arguments: Sequence[str], folder: Path, log: Path, changes: dict[str, str]) -> None:
    from gatewatt.cli import main

    _redirect(log)
    os.chdir(folder)
    os.environ.update(changes)
    # As a terminal has it: a job in the background is started with Ctrl+C ignored, and so is everything that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["gatewatt", *arguments]
    sys.exit(main(arguments))


def start(arguments: Sequence[str], folder: Path, log: Path, **changes: str) -> BaseProcess:
    """Start the command in a process of its own that can be killed; what it prints goes to ``log``."""
    process = _server().Process(target=_command, args=(list(arguments), folder, log, changes))
    process.start()
    return process


def finish(arguments: Sequence[str], folder: Path, log: Path, *, timeout: float = 600, **changes: str) -> int:
    """Run the command to its end; returns the exit code."""
    process = start(arguments, folder, log, **changes)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"gatewatt {' '.join(arguments)} took more than {timeout} s")
    return process.exitcode


def _answer(function: Callable[..., Any], arguments: Sequence[Any], log: Path, pipe: Connection) -> None:
    _redirect(log)
    try:
        pipe.send((function(*arguments), None))
    except BaseException as error:
        pipe.send((None, (type(error).__name__, str(error), traceback.format_exc())))


def apart(function: Callable[..., Any], *arguments: Any, log: Path, timeout: float = 3600) -> Any:
    """Call a function in a process of its own, where neither its prints nor its warnings nor its settings matter to anyone.

    Raises:
        NotMeasured: as the function raised it.
        RuntimeError: with the function's traceback, if it raised anything else.
    """
    receiver, sender = _server().Pipe(duplex=False)
    process = _server().Process(target=_answer, args=(function, arguments, log, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise TimeoutError(f"{function.__name__} took more than {timeout} s")
        answer, error = receiver.recv()
    finally:
        if process.is_alive():
            process.join(10)
        process.kill()
    if error is None:
        return answer
    if error[0] == NotMeasured.__name__:
        raise NotMeasured(error[1])
    raise RuntimeError(f"{function.__name__}: {error[0]}: {error[1]}\n{error[2]}")


def complaints(log: Path) -> list[str]:
    """The error lines that a command printed."""
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("gatewatt: error")]


# ---- what a run leaves ----


def differences(one: Path, other: Path) -> list[str]:
    """What differs between the folders of two runs that should have ended alike: weights, optimiser, and every figure that was written."""
    import torch

    from gatewatt.callbacks.saving import AtomicCheckpointIO

    found = []
    for name in ("metrics.jsonl", "metrics.csv", "result.json", "skipnet-8-digits.safetensors"):
        if not (one / name).exists() or not (other / name).exists():
            found.append(f"{name} is missing")
        elif (one / name).read_bytes() != (other / name).read_bytes():
            found.append(f"{name} differs")
    left = [path.name for path in other.rglob("*.tmp")]
    if left:
        found.append(f"left behind: {', '.join(left)}")
    try:
        states = [AtomicCheckpointIO().load_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (one, other)]
    except (OSError, ValueError) as error:
        return [*found, str(error)]
    for group in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        first, second = ([*leaves(state[group])] for state in states)
        same = len(first) == len(second) and all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b for a, b in zip(first, second, strict=True)
        )
        if not same:
            found.append(f"{group} differs")
    return found


def leaves(value: Any) -> list[Any]:
    """Every plain value and tensor of a nested state, in order."""
    if isinstance(value, dict):
        return [leaf for name in value for leaf in (str(name), *leaves(value[name]))]
    if isinstance(value, (list, tuple)):
        return [leaf for below in value for leaf in leaves(below)]
    return [value]
