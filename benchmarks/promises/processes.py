"""Row 6: several processes measure what one does, to the last image."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.promises.base import Outcome, apart, complaints, environment, gatewatt, tally

BATCHES = (1, 3)  # batch sizes; with n images a batch size b makes enough batches for two ranks from n = b + 1 on
TIMES = ("wall_seconds", "images_per_second")


def evaluation(count: int, folder: Path) -> Outcome:
    """Test sets of 2 to ``count`` images on two gloo processes and on one: rows, summary and adversarial images compared; then too few images."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(images, batch) for images in range(2, count + 1) for batch in BATCHES if images > batch]
    apart(_evaluate, 0, 1, 0, folder / "one", jobs, log=folder / "one.log")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # One image on two processes comes last: it is refused.
    together(2, port, folder / "two", [*jobs, (1, 1)], folder)
    results: list[str | None] = []
    for images, batch in jobs:
        name = f"{images}-{batch}"
        wrong = unequal(folder / "one" / name, folder / "two" / name, images)
        results.append(f"{images} images in batches of {batch}: {wrong}" if wrong else None)
    said = [path.read_text() for path in sorted((folder / "two" / "1-1").glob("refused-*"))]
    results.append(None if len(said) == 2 and all("fewer than the 2 processes" in line for line in said) else f"one image on two processes: {said}")
    note = f"2 to {count} images, batches of {' and '.join(map(str, BATCHES))}; one image refused"
    if count >= 7:
        results += [command(folder, 7), refused(folder)]
        note += "; the same by `gatewatt test --trainer.devices 2`, by Lightning and by torchrun"
    return tally(results, note)


def together(world: int, port: int, folder: Path, jobs: list[tuple[int, int]], logs: Path) -> None:
    """Run :func:`_evaluate` on ``world`` processes at once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(world) as pool:
        calls = [pool.submit(apart, _evaluate, rank, world, port, folder, jobs, log=logs / f"rank{rank}.log") for rank in range(world)]
        for call in calls:
            call.result()


def _evaluate(rank: int, world: int, port: int, folder: Path, jobs: list[tuple[int, int]]) -> None:
    """One process: attack every test set, and write what ``gatewatt test`` writes and the digest of every adversarial image."""
    os.environ.update(environment())
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    import torch
    from lightning.pytorch import Trainer

    from gatewatt.attacks import GradMDM
    from gatewatt.callbacks import ResultFiles
    from gatewatt.data import Batch, DigitsData
    from gatewatt.data.order import TooFewBatches
    from gatewatt.networks import SkipNet
    from gatewatt.tasks import EnergyAttackEvaluation
    from gatewatt.tasks.attack import Attacked

    class Hashed(EnergyAttackEvaluation):
        """Keeps the digest of every adversarial image."""

        digests: dict[int, str]

        def craft(self, batch: Batch) -> Attacked:
            attacked = super().craft(batch)
            for index, image in zip(batch.ids.tolist(), attacked.adversarial, strict=True):
                self.digests[index] = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
            return attacked

    torch.manual_seed(1)
    task = Hashed(SkipNet(8, width=4).eval(), GradMDM(gamma=1.0, steps=3, lr=0.05), channels_last=False)
    for images, batch in jobs:
        place = folder / f"{images}-{batch}"
        place.mkdir(parents=True, exist_ok=True)
        task.digests = {}
        settings: dict[str, Any] = {"strategy": "ddp", "devices": world} if world > 1 else {"devices": 1}
        trainer = Trainer(
            default_root_dir=place,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[ResultFiles()],
            **settings,
        )
        try:
            trainer.test(task, datamodule=DigitsData(test_images=images, eval_batch_size=batch), verbose=False)
        except TooFewBatches as error:
            (place / f"refused-{rank}").write_text(str(error))
        (place / f"digests-{rank}.json").write_text(json.dumps(task.digests))


def unequal(one: Path, two: Path, images: int) -> str | None:
    """What differs between the results of one process and of two, or None."""
    digests = [
        {int(key): value for part in sorted(place.glob("digests-*.json")) for key, value in json.loads(part.read_text()).items()}
        for place in (one, two)
    ]
    seen = sum(len(json.loads(part.read_text())) for part in two.glob("digests-*.json"))
    if len(digests[1]) != images or seen != images:
        return f"{seen} images attacked on two processes, {len(digests[1])} of them different, {images} expected"
    if digests[0] != digests[1]:
        return f"{sum(digests[0][index] != digests[1].get(index) for index in digests[0])} adversarial images differ"
    if (one / "records.csv").read_bytes() != (two / "records.csv").read_bytes():
        return "records.csv differs"
    summaries = [json.loads((place / "summary.json").read_text()) for place in (one, two)]
    differing = [key for key in summaries[0] if key not in TIMES and summaries[0][key] != summaries[1][key]]
    return f"summary differs in {', '.join(differing)}" if differing else None


def recipe(folder: Path, images: int) -> None:
    """A recipe that attacks ``images`` test images."""
    (folder / "attack.yaml").write_text(f"""\
extends: [task/attack, data/digits]
model:
  init_args:
    network:
      class_path: gatewatt.networks.SkipNet
      init_args: {{depth: 8, num_classes: 10, width: 4}}
    attack:
      class_path: gatewatt.attacks.GradMDM
      init_args: {{steps: 2}}
data:
  init_args: {{test_images: {images}, eval_batch_size: 2}}
trainer: {{accelerator: cpu, enable_progress_bar: false}}
""")


def command(folder: Path, images: int) -> str | None:
    """``gatewatt test`` on one device and on two, as a user starts them: the second process by Lightning, and both by torchrun."""
    recipe(folder, images)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gatewatt", "--"]
    ways = {"one": ("1", ["-m", "gatewatt"]), "two": ("2", ["-m", "gatewatt"]), "torchrun": ("2", launcher)}
    for run, (devices, start) in ways.items():
        line = [sys.executable, *start, "test", "-c", "attack.yaml", "--run", run, "--trainer.devices", devices]
        answer = subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False)
        if answer.returncode != 0:
            return f"gatewatt test, {run}: exit code {answer.returncode}: {answer.stderr[-500:]}"
    rows = {run: (folder / "runs" / run / "records.csv").read_bytes() for run in ways}
    differing = [run for run in ways if rows[run] != rows["one"]]
    return f"gatewatt test: other records than on one device: {', '.join(differing)}" if differing else None


def refused(folder: Path) -> str | None:
    """Fewer images than processes."""
    recipe(folder, 1)
    answer = gatewatt(["test", "-c", "attack.yaml", "--run", "too-few", "--trainer.devices", "2"], folder, timeout=300)
    log = folder / "too-few.log"
    log.write_text(answer.stderr)
    lines = complaints(log)
    if answer.returncode != 2 or len(lines) != 1 or "fewer than the 2 processes" not in lines[0] or "Traceback" in answer.stderr:
        return f"one image on two processes: exit code {answer.returncode}, {lines or answer.stderr[-500:]}"
    return None
