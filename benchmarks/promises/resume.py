"""Rows 3, 4, 14 and 15: a run that is killed, stopped or repeated ends as one that is not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.promises.base import TRAINING, NotMeasured, Outcome, apart, differences, environment, finish, start, tally


def prepare(folder: Path) -> float:
    """Write the recipe and let one run go through undisturbed; returns its seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(TRAINING)
    begun = time.monotonic()
    code = finish(["fit", "-c", "small.yaml", "--run", "whole"], folder, folder / "whole.log")
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {(folder / 'whole.log').read_text()[-2000:]}")
    return time.monotonic() - begun


def kills(count: int, folder: Path) -> Outcome:
    """SIGKILL at random moments of energy-adversarial training under ``resume: auto``, ``count`` times; every run that ends is compared."""
    seconds = prepare(folder)
    chance = random.Random(3)
    killed, failed, run = 0, 0, 0
    pending = 0
    failures: list[str] = []
    finished = 0
    while killed < count or pending:
        name, begun = f"killed-{run}", time.monotonic()
        process = start(["fit", "-c", "small.yaml", "--run", name, "--resume", "auto"], folder, folder / f"{name}.log")
        if killed < count:
            # Beyond the end of a run, so that writing the results is hit too; often near its beginning, where nothing is saved yet.
            process.join(chance.uniform(0, 1.1 * seconds))
        else:
            process.join(600)
        if process.exitcode is None:
            process.kill()
            process.join()
            killed, pending = killed + 1, pending + 1
            continue
        if not pending:
            # A run that nothing disturbed: the moments of the next kills follow what the machine has time for now.
            seconds = min(seconds, time.monotonic() - begun)
        found = differences(folder / "runs" / "whole", folder / "runs" / name) if process.exitcode == 0 else [f"exit code {process.exitcode}"]
        if found:
            failures.append(f"{name} ({pending} kills): {'; '.join(found)}")
            failed += pending
        finished += 1
        run, pending = run + 1, 0
    note = f"{killed} kills over {finished} runs of 18 steps; weights, optimiser, metrics and exported file compared byte by byte"
    return Outcome(killed - failed, killed, note, tuple(failures))


def every_step(count: int, folder: Path) -> Outcome:
    """Resume from the checkpoint of every one of ``count`` steps (24 are two epochs), with 0 and with 2 loader workers, with validation."""
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
    # The last step has nothing left to do; the boundary of the epochs comes first, since it is where resuming fails elsewhere.
    order = sorted(range(1, total), key=lambda step: abs(step - total // 2))
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
    """Kill one of two ranks under ``torchrun --max-restarts``, ``count`` times over; the restarted run ends as one that was not killed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "small.yaml").write_text(TRAINING)
    chance = random.Random(15)

    def command(name: str) -> subprocess.Popen[bytes]:
        log = (folder / f"{name}.log").open("wb")
        # The clean warm-up trains no gates.
        strategy = ["--trainer.devices", "2", "--trainer.strategy", "ddp_find_unused_parameters_true"]
        arguments = ["fit", "-c", "small.yaml", "--run", name, "--resume", "auto", *strategy]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", "-m", "gatewatt", "--"]
        variables = environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        return subprocess.Popen([sys.executable, *launcher, *arguments], cwd=folder, env=variables, stdout=log, stderr=log)

    begun = time.monotonic()
    whole = command("whole")
    whole.wait(900)
    seconds = time.monotonic() - begun
    if whole.returncode != 0:
        raise RuntimeError(f"torchrun ended with {whole.returncode}: {(folder / 'whole.log').read_text(errors='replace')[-2000:]}")
    results: list[str | None] = []
    for index in range(count):
        name = f"killed-{index}"
        process = command(name)
        metrics, deadline = folder / "runs" / name / "metrics.jsonl", time.monotonic() + 600
        # Once it trains, since a rank killed before that has nothing to lose.
        while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 1))
        ranks = workers_of(process.pid)
        if not ranks:
            raise NotMeasured("the run was over before a rank could be killed")
        os.kill(chance.choice(ranks), signal.SIGKILL)
        process.wait(900)
        found = differences(folder / "runs" / "whole", folder / "runs" / name) if process.returncode == 0 else [f"exit code {process.returncode}"]
        results.append(f"{name}: {'; '.join(found)}" if found else None)
    return tally(results, f"2 gloo processes, --max-restarts 3, the undisturbed run took {seconds:.0f} s")


def workers_of(agent: int) -> list[int]:
    """Processes that torchrun's agent started."""
    try:
        text = Path(f"/proc/{agent}/task/{agent}/children").read_text()
    except OSError as error:
        raise NotMeasured("no /proc to find the ranks in") from error
    return [int(pid) for pid in text.split()]
