"""Stopping a run from outside: a signal becomes a checkpoint from which the run can go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gatewatt.callbacks.saving import stepped, validation_follows
from gatewatt.cli.folder import process_rank
from gatewatt.cli.resume import resuming_command, say


class Stop(L.Callback):
    """Turns a request to stop (SIGTERM, Ctrl+C) into a checkpoint after the step at work, from which the run can be resumed exactly.

    On several processes they agree after every step, so one that is asked stops them all. A second Ctrl+C stops at once, with what was saved
    before. Where a validation follows the step, a checkpoint is written at once and again after it, which is when the run stops.

    Args:
        folder: the run's folder; the checkpoint is ``interrupted.ckpt`` in it.
        command: verb and arguments of the run.
        automatic: whether the run resumes by itself.
    """

    def __init__(self, folder: Path, command: Sequence[str], *, automatic: bool = False) -> None:
        self.folder, self.command, self.automatic = folder, list(command), automatic
        self.noted = 0

    def _listen(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over SIGTERM from Lightning, and Ctrl+C where it is still Python's: a job in the background ignores it."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    on_train_start = on_test_start = on_predict_start = _listen

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen in a validation that stands alone, too."""
        if trainer.state.fn == "validate":
            self._listen(trainer, pl_module)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if process_rank() == 0:
                say("stopping after this step; once more stops at once")

    def _agreed(self, trainer: L.Trainer) -> int:
        """The signal that any process received, or 0."""
        # Lightning listens from an earlier moment on.
        own = self.noted or (int(signal.SIGTERM) if trainer.received_sigterm else 0)
        if trainer.world_size == 1:
            return own
        return int(trainer.strategy.reduce(torch.tensor(float(own), device=trainer.strategy.root_device), reduce_op="max"))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and stop, if asked to, where the optimiser has just stepped."""
        number = self._agreed(trainer)
        if not number or not stepped(trainer, batch_idx):
            return
        if validation_follows(trainer, batch_idx):
            # Only what is lost if there is no time for the validation: a run resumed from here would leave that out.
            self._save(trainer, tell=False)
            self.noted = number
        else:
            self._save(trainer)
            self._leave(number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save and stop, if asked to, after the epoch's validation."""
        number = self._agreed(trainer)
        if number:
            self._save(trainer)
            self._leave(number)

    def _evaluated(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Stop an evaluation, if asked to; there is nothing to save."""
        if self.noted and trainer.state.fn != "fit":
            launcher = trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "kill"):
                # The other processes would wait for this one.
                launcher.kill(signal.SIGTERM)
            self._leave(self.noted)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _evaluated  # type: ignore[assignment]

    def _save(self, trainer: L.Trainer, *, tell: bool = True) -> None:
        path = Path(trainer.default_root_dir) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        if tell and trainer.is_global_zero:
            say(f"saved step {trainer.global_step}; resume with: {resuming_command(self.command, path, automatic=self.automatic)}")

    @staticmethod
    def _leave(number: int) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back; Lightning has done so already where a run ended by itself."""
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == self._note:
                signal.signal(number, default)
