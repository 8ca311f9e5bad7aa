"""Files are written whole or not at all.

A temporary file in the target's own folder, flushed to disk, then renamed over the name: a kill at any moment leaves the old file or the
new one, never half of one. In the target's folder, because a rename across file systems is a copy, and a copy can be cut short.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes ``path`` when the block ends without an error; otherwise ``path`` stays as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Without this a power cut can lose the rename. Windows cannot open folders, and does not need to.
    if os.name == "nt":
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Make ``path`` hold ``content``, or leave it as it was, whatever happens in between."""
    with replacing(path) as stream:
        stream.write(content)


def write_text(path: str | Path, text: str) -> Path:
    """Write ``text`` to ``path`` as UTF-8 with bare newlines, replacing a file of that name in one step; its folder is made if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    return path


def write_new(path: str | Path, text: str) -> Path:
    """:func:`write_text` to a file that must not exist yet.

    Raises:
        FileExistsError: a measured result is never overwritten.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already and results are never overwritten: choose another run folder or move it away")
    return write_text(path, text)
