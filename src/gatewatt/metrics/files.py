"""Result files are written whole or not at all.

A temporary file in the target's own folder, flushed to disk, then renamed over the name: a kill at any moment leaves the old file or the
new one, never half of one.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_new(path: str | Path, text: str) -> Path:
    """Write ``text`` to a file that must not exist yet; its folder is made if needed.

    Raises:
        FileExistsError: a measured result is never overwritten.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already and results are never overwritten: choose another run folder or move it away")
    return write_whole(path, text)


def write_whole(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` as UTF-8 with bare newlines, replacing a file of that name in one step."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    # Without this a power cut can lose the rename. Windows cannot open folders, and does not need to.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
