"""Rows 3, 4, 14 and 15: a run that is killed, stopped or repeated ends as one that is not."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.promises.base import TRAINING, NotMeasured, Outcome, apart, differences, environment, finish, start, tally

STEPS = 18  # of the small recipe
PATIENCE = 600.0  # seconds after which a run that does nothing is given up


class Seconds(NamedTuple):
    """How long an undisturbed run takes: until its first step is done, and from there to its end."""

    before: float
    training: float


def prepare(folder: Path) -> Seconds:
    """Write the recipe and let one run go through undisturbed; returns its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(TRAINING)
    # The first process waits for the server's imports, which no later one does: it is not the one to be timed.
    apart(int, log=folder / "warm.log")
    metrics, begun = folder / "runs" / "whole" / "metrics.jsonl", time.monotonic()
    process = start(["fit", "-c", "small.yaml", "--run", "whole"], folder, folder / "whole.log")
    wait_for(metrics, process, None)
    stepped = time.monotonic()
    process.join(PATIENCE)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"the undisturbed run ended with {process.exitcode}: {(folder / 'whole.log').read_text()[-2000:]}")
    return Seconds(stepped - begun, time.monotonic() - stepped)


def written(file: Path) -> int | None:
    """When a file was written last, in nanoseconds; None where there is none."""
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def wait_for(file: Path, process: BaseProcess, before: int | None) -> None:
    """Wait until ``file`` was written again since ``before``, or the process has ended."""
    deadline = time.monotonic() + PATIENCE
    while written(file) == before and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.002)


def kills(count: int, folder: Path) -> Outcome:
    """SIGKILL at random moments of energy-adversarial training under ``resume: auto``, ``count`` times; every run that ends is compared."""
    seconds, chance = prepare(folder), random.Random(3)
    places = dict.fromkeys(("before a step", "in training", "while results were written"), 0)
    failures: list[str] = []
    killed = failed = run = pending = 0
    while killed < count or pending:
        name = f"killed-{run}"
        metrics = folder / "runs" / name / "metrics.jsonl"
        before = written(metrics)
        process = start(["fit", "-c", "small.yaml", "--run", name, "--resume", "auto"], folder, folder / f"{name}.log")
        if killed == count:
            process.join(PATIENCE)
        elif chance.random() < 0.2:
            process.join(chance.uniform(0, seconds.before))
        else:
            wait_for(metrics, process, before)
            # Beyond the end, so that writing the results is hit too.
            process.join(chance.uniform(0, 1.1 * seconds.training))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed, pending = killed + 1, pending + 1
            places["before a step" if written(metrics) == before else "while results were written" if done(metrics) else "in training"] += 1
            continue
        found = differences(folder / "runs" / "whole", folder / "runs" / name) if process.exitcode == 0 else [f"exit code {process.exitcode}"]
        if found:
            failures.append(f"{name} ({pending} kills): {'; '.join(found)}")
            failed += pending
        run, pending = run + 1, 0
    where = ", ".join(f"{number} {place}" for place, number in places.items())
    note = f"{killed} kills ({where}) over {run} runs of {STEPS} steps; weights, optimiser, metrics and exported file compared byte by byte"
    return Outcome(killed - failed, killed, note, tuple(failures))


def done(metrics: Path) -> bool:
    """Whether the last line of a metrics file is the validation after the last step."""
    rows = metrics.read_text().splitlines()
    # A kill may leave half a line.
    return bool(rows) and rows[-1].endswith("}") and json.loads(rows[-1])["step"] == STEPS and "val/accuracy" in rows[-1]


def every_step(count: int, folder: Path) -> Outcome:
    """Resume from the checkpoints of ``count`` steps (24 are two epochs, and all), with 0 and with 2 loader workers, with validation."""
    return apart(_every_step, count, folder, log=folder / "every-step.log")


def _every_step(count: int, folder: Path) -> Outcome:
    import numpy as np
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from PIL import Image

    from gatewatt.attacks import GradMDM
    from gatewatt.callbacks import AtomicCheckpointIO
    from gatewatt.data import FolderData
    from gatewatt.networks import SkipNet
    from gatewatt.tasks import EnergyAdversarialTraining, Optimization

    random_pixels = np.random.default_rng(4)
    for index in range(24 * 4 // 2 + 12):
        path = folder / "images" / "train" / str(index % 3) / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random_pixels.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)

    def fit(workers: int, checkpoint: Path | None, steps: Path | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        network = SkipNet(8, num_classes=3, width=4, decision="sampled")
        task = EnergyAdversarialTraining(network, GradMDM(steps=1), optimization=Optimization(lr=0.05, schedule="one_cycle"))
        data = FolderData(str(folder / "images"), in_memory=False, batch_size=4, eval_batch_size=4, val_images=12, workers=workers)
        callbacks: list[Any] = [] if steps is None else [ModelCheckpoint(steps, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
        trainer = Trainer(
            default_root_dir=folder,
            max_epochs=2,
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=steps is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            plugins=[AtomicCheckpointIO()],
        )
        trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return {name: tensor.clone() for name, tensor in task.state_dict().items()}

    whole = fit(0, None, folder / "steps")
    total = len(list((folder / "steps").glob("*.ckpt")))
    results = []
    # The boundary of the epochs comes first, since it is where resuming fails elsewhere; the last step has nothing left to do but to end.
    order = sorted(range(1, total + 1), key=lambda step: abs(step - total // 2))
    for step in order[:count]:
        for workers in (0, 2):
            resumed = fit(workers, folder / "steps" / f"step={step}.ckpt", None)
            spoiled = [name for name in whole if not torch.equal(whole[name], resumed[name])]
            results.append(f"from step {step} with {workers} workers: {len(spoiled)} tensors differ" if spoiled else None)
    return tally(results, f"{total} steps over two epochs, 0 and 2 workers, validation in between")


def repeated(count: int, folder: Path) -> Outcome:
    """The same recipe ``count`` more times: the same weights, optimiser and figures to the last bit."""
    prepare(folder)
    results: list[str | None] = []
    for index in range(count):
        code = finish(["fit", "-c", "small.yaml", "--run", f"again-{index}"], folder, folder / f"again-{index}.log")
        found = differences(folder / "runs" / "whole", folder / "runs" / f"again-{index}") if code == 0 else [f"exit code {code}"]
        results.append("; ".join(found) or None)
    return tally(results, "one thread; weights, optimiser, metrics and exported file compared byte by byte")


def torchrun(count: int, folder: Path) -> Outcome:
    """Kill one of two ranks under ``torchrun --max-restarts``, ``count`` times over; the restarted run ends as one that was not killed.

    So does a run whose two ranks belong to an agent each, as on two machines.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(TRAINING)
    chance = random.Random(15)

    def log_of(name: str) -> Path:
        return folder / f"{name}.log"

    def command(name: str, *meeting: str, machines: int = 1) -> subprocess.Popen[bytes]:
        log = log_of(name).open("ab")
        each = str(2 // machines)
        launcher = ["-m", "torch.distributed.run", *meeting, "--nproc-per-node", each, "--max-restarts", "3", "-m", "gatewatt", "--"]
        # The clean warm-up trains no gates.
        spread = ["--trainer.devices", each, "--trainer.num_nodes", str(machines), "--trainer.strategy", "ddp_find_unused_parameters_true"]
        arguments = ["fit", "-c", "small.yaml", "--run", name, "--resume", "auto", *spread]
        variables = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        return subprocess.Popen([sys.executable, *launcher, *arguments], cwd=folder, env=variables, stdout=log, stderr=log)

    def outcome(name: str, codes: list[int]) -> str | None:
        if any(codes):
            return f"{name}: exit codes {codes}: {log_of(name).read_text(errors='replace')[-500:]}"
        found = differences(folder / "runs" / "whole", folder / "runs" / name)
        return f"{name}: {'; '.join(found)}" if found else None

    begun = time.monotonic()
    code = command("whole", "--standalone").wait(900)
    seconds = time.monotonic() - begun
    if code != 0:
        raise RuntimeError(f"torchrun ended with {code}: {log_of('whole').read_text(errors='replace')[-2000:]}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{probe.getsockname()[1]}"
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", place]
    agents = [command("machines", *meeting, machines=2) for _ in range(2)]
    results: list[str | None] = [outcome("machines", [agent.wait(900) for agent in agents])]
    attempts = 0
    while len(results) <= count:
        attempts += 1
        if attempts > 20 * count:
            raise NotMeasured("the run was always over before a rank could be killed")
        name = f"killed-{attempts}"
        process = command(name, "--standalone")
        metrics, deadline = folder / "runs" / name / "metrics.jsonl", time.monotonic() + PATIENCE
        # Once it trains, since a rank killed before that has nothing to lose.
        while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 1))
        ranks = workers_of(process.pid)
        if ranks:
            os.kill(chance.choice(ranks), signal.SIGKILL)
        process.wait(900)
        # Every start says what it found in the run's folder. One start means that the run was over when the signal came.
        starts = sum(line.startswith("gatewatt: ") and f"runs/{name}" in line for line in log_of(name).read_text(errors="replace").splitlines())
        if process.returncode == 0 and starts < 2:
            continue
        results.append(outcome(name, [process.returncode]))
    note = f"2 gloo processes, {count} kills, each restarted (--max-restarts 3), and once an agent each as on two machines"
    return tally(results, f"{note}; the undisturbed run took {seconds:.0f} s")


def workers_of(agent: int) -> list[int]:
    """Processes that torchrun's agent started."""
    try:
        text = Path(f"/proc/{agent}/task/{agent}/children").read_text()
    except OSError as error:
        raise NotMeasured("no /proc to find the ranks in") from error
    return [int(pid) for pid in text.split()]
