"""Training checkpoints that a kill, a full disk or a read-only folder cannot damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from gatewatt.files import replacing


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target and renames it; pass it to ``Trainer(plugins=[...])``.

    Lightning writes to the system's temporary folder and moves the file, which across file systems is a copy that can be cut short, and
    swallows a refusal by the target folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, whole or not at all.

        Raises:
            OSError: if the folder cannot be written or the disk is full; a checkpoint of that name is then as it was.
        """
        if storage_options is not None:
            raise TypeError("storage_options are for remote storage; gatewatt writes checkpoints to local folders only")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            torch.save(checkpoint, stream)

    def load_checkpoint(self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of this class; never unpickles code.

        Raises:
            ValueError: in one line, if the file is damaged or holds more than tensors, numbers and strings.
        """
        try:
            # Tensors may come from any device; Lightning moves them where they belong.
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:
            reason = str(error).split("\n")[0][:160]
            raise ValueError(f"{path} is no sound training checkpoint ({type(error).__name__}: {reason}); use another one") from error
