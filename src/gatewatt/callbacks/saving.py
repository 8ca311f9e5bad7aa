"""What a training run keeps so that it can be taken up again: checkpoints and metrics that a kill, a full disk or a flipped bit cannot spoil."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from gatewatt.files import WriteFailed, replacing, write_text

SEAL = b"gatewatt sha256 "
"""Opens the comment of the zip archive that a checkpoint is; the digest follows in hexadecimal."""

_END = b"PK\x05\x06"  # opens the last record of a zip archive: 22 bytes, the last two of them the length of the comment that follows
_COMMENT = len(SEAL) + 64


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it; pass it to ``Trainer(plugins=[...])``.

    Lightning writes to the system's temporary folder and moves the file, which across file systems is a copy that can be cut short, and
    swallows a refusal by the target folder. And neither it nor torch notices a flipped byte: here the SHA-256 of the content is in the
    file itself, as the comment of the zip archive that ``torch.save`` writes, so other readers still read it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, whole or not at all.

        Raises:
            WriteFailed: if the folder cannot be written or the disk is full; a checkpoint of that name is then as it was.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote storage; gatewatt writes checkpoints to local folders only")
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteFailed(path, error) from error
        with replacing(path) as stream:
            sink = _Sink(stream)
            # Reached through the stream's two methods alone, whatever torch's declaration asks for.
            torch.save(checkpoint, sink)  # type: ignore[arg-type]
            sink.seal()

    def load_checkpoint(self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of this class; never unpickles code.

        Raises:
            ValueError: in one line, if the file is damaged or holds more than tensors, numbers and strings.
        """
        with Path(path).open("rb") as stream:
            verify(stream, path)
            stream.seek(0)
            try:
                # Tensors may come from any device; Lightning moves them where they belong.
                content = torch.load(stream, map_location=map_location or "cpu", weights_only=True)
            except OSError:
                raise
            except Exception as error:
                reason = str(error).split("\n")[0][:160]
                raise ValueError(f"{path} is no sound training checkpoint ({type(error).__name__}: {reason}); use another one") from error
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            raise ValueError(f"{path} is no training checkpoint: it holds no state_dict; use another one")
        return content


class _Sink:
    """What ``torch.save`` writes into: hashes what passes, and keeps an error of the disk to raise it outside of torch's C++ code."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.digest, self.end = stream, hashlib.sha256(), b""
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Pass ``data`` on; after an error nothing more is."""
        view = memoryview(data).cast("B")
        if self.error is None:
            try:
                self.stream.write(view)
            except OSError as error:
                self.error = error
        # All but the last two bytes: those say how long the comment is, which is none until there is a digest.
        recent = self.end + bytes(view[-2:])
        if len(view) > 2:
            self.digest.update(self.end)
            self.digest.update(view[:-2])
            recent = bytes(view[-2:])
        self.digest.update(recent[:-2])
        self.end = recent[-2:]
        return len(view)

    def flush(self) -> None:
        """Flush what was passed on."""
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self.error = error

    def seal(self) -> None:
        """Add the digest, or raise what the disk said."""
        if self.error is not None:
            raise self.error
        if self.end != b"\0\0":
            raise RuntimeError("torch.save no longer writes a zip archive without a comment; the digest has no place")
        comment = SEAL + self.digest.hexdigest().encode()
        self.stream.seek(-2, os.SEEK_END)
        self.stream.write(len(comment).to_bytes(2, "little") + comment)


def verify(stream: BinaryIO, path: str | Path) -> None:
    """Raise unless the content of a training checkpoint is what was written.

    A checkpoint that Lightning wrote by itself carries no digest; the checksums of its zip archive are compared instead.

    Raises:
        ValueError: in one line.
    """
    size = stream.seek(0, os.SEEK_END)
    if size == 0:
        raise ValueError(f"{path} is empty; use another checkpoint")
    stream.seek(max(0, size - 22 - _COMMENT))
    end = stream.read()
    stream.seek(0)
    if stream.read(4) != b"PK\x03\x04":
        raise ValueError(f"{path} is no training checkpoint: those are zip archives; use another one")
    sealed = end[:4] == _END and end[20:22] == _COMMENT.to_bytes(2, "little") and end[22:].startswith(SEAL)
    if sealed:
        digest, left = hashlib.sha256(), size - 2 - _COMMENT
        stream.seek(0)
        while left > 0 and (block := stream.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        sound = digest.hexdigest().encode() == end[22 + len(SEAL) :]
    else:
        stream.seek(0)
        try:
            with zipfile.ZipFile(stream) as archive:
                sound = end[-22:-18] == _END and end[-2:] == b"\0\0" and archive.testzip() is None
        # A damaged archive can fail in any of its fields.
        except Exception:
            sound = False
    if not sound:
        raise ValueError(f"{path} is damaged: its content is not what was written; use another checkpoint")


def validation_follows(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation or the end of the epoch follows a batch.

    Lightning leaves both out in a run that is resumed from a checkpoint made after such a batch: made a moment later, or one batch earlier,
    the resumed run does what the uninterrupted one did.
    """
    every = trainer.val_check_batch
    return trainer.is_last_batch or (every is not None and math.isfinite(every) and (batch_idx + 1) % every == 0)


def stepped(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the optimiser stepped on a batch, rather than added up its gradient."""
    return trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class LastCheckpoint(Checkpoint):
    """Keep ``checkpoints/last.ckpt`` in the run's folder: where ``resume: auto`` continues.

    Args:
        every: optimiser steps between two writes; left out: at the end of every epoch alone.
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self.every, self.saved = every, 0

    def state_dict(self) -> dict[str, Any]:
        """The step of the last write."""
        return {"saved": self.saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the rhythm of the interrupted run."""
        self.saved = state_dict["saved"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write if it is time, unless the epoch's end will."""
        due = self.every is not None and trainer.global_step - self.saved >= self.every
        if due and stepped(trainer, batch_idx) and not validation_follows(trainer, batch_idx):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, after the epoch's validation."""
        self._save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what a run that was stopped at its very end is resumed with: no step is left that would."""
        if self.saved != trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.saved = trainer.global_step
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt")


class MetricsFile(L.Callback):
    """Write what is logged to ``metrics.jsonl`` in the run's folder as it comes, and render ``metrics.csv`` from it.

    A checkpoint remembers how much of the file it vouches for: a run that is resumed in its folder cuts the rest off and goes on, so the
    file ends as that of a run that was never interrupted. ``result.json`` holds the last figures, and says that the run is complete.
    """

    def __init__(self) -> None:
        self.digest, self.position = hashlib.sha256(), 0
        self.restored: dict[str, Any] | None = None
        self.latest: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """How much of the file belongs to the checkpoint, and the latest figures."""
        return {"position": self.position, "sha256": self.digest.hexdigest(), "latest": self.latest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember what to cut the file to."""
        self.restored = state_dict

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take up the file of the interrupted run, or begin a new one."""
        state = self.restored or {"position": 0, "sha256": hashlib.sha256().hexdigest(), "latest": {}}
        # Callbacks that read the latest figures when training is over find them also where no step was left to do.
        self.latest = dict(state["latest"])
        trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float64) for name, value in self.latest.items()})
        if not self._writes(trainer):
            return
        path = self._file(trainer)
        kept = path.read_bytes()[: state["position"]] if path.exists() else b""
        digest = hashlib.sha256(kept)
        if len(kept) == state["position"] and digest.hexdigest() == state["sha256"]:
            self.digest, self.position = digest, len(kept)
            if path.exists():
                os.truncate(path, len(kept))
        elif path.exists():
            # Not what the checkpoint vouches for, so nothing of it is cut or continued.
            number = next(number for number in range(1, 1_000_000) if not path.with_name(f"metrics-{number}.jsonl").exists())
            path.replace(path.with_name(f"metrics-{number}.jsonl"))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the figures of a step, before any checkpoint of this step is written."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and stepped(trainer, batch_idx) and trainer.global_step % every == 0:
            self._note(trainer, lambda name: not name.startswith(("val/", "test/")))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the figures of a validation."""
        if not trainer.sanity_checking:
            self._note(trainer, lambda name: name.startswith("val/"))
            self.render(trainer)
            self._finish(trainer, "validate")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the table up to date."""
        self.render(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Bring the table up to date once more, and say that the run is complete."""
        self.render(trainer)
        self._finish(trainer, "fit")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the figures of a test, if it logs any."""
        self._note(trainer, lambda name: name.startswith("test/"))
        if self.position:
            self.render(trainer)
            self._finish(trainer, "test")

    def render(self, trainer: L.Trainer) -> None:
        """Write ``metrics.csv``: one line per row, a column per figure in the order of appearance."""
        path = self._file(trainer)
        if not self._writes(trainer) or not path.exists():
            return
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(path.with_suffix(".csv"), text.getvalue())

    def _note(self, trainer: L.Trainer, wanted: Callable[[str], bool]) -> None:
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if wanted(name)}
        if not figures:
            return
        self.latest |= figures
        if self._writes(trainer):
            # JSON has no NaN; a figure that is undefined is null.
            plain = {name: value if math.isfinite(value) else None for name, value in figures.items()}
            line = (json.dumps({"epoch": trainer.current_epoch, "step": trainer.global_step, **plain}) + "\n").encode()
            with self._file(trainer).open("ab") as stream:
                stream.write(line)
            self.position += len(line)
            self.digest.update(line)

    def _finish(self, trainer: L.Trainer, verb: str) -> None:
        if self._writes(trainer) and trainer.state.fn == verb:
            figures = {name: value if math.isfinite(value) else None for name, value in sorted(self.latest.items())}
            result = {"verb": verb, "steps": trainer.global_step, "max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
            write_text(Path(trainer.default_root_dir) / "result.json", json.dumps({**result, "figures": figures}, indent=2) + "\n")

    @staticmethod
    def _writes(trainer: L.Trainer) -> bool:
        return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]

    @staticmethod
    def _file(trainer: L.Trainer) -> Path:
        return Path(trainer.default_root_dir) / "metrics.jsonl"
