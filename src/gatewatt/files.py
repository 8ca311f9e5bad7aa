"""Files are written whole or not at all.

A temporary file in the target's own folder, flushed to disk, then renamed over the name: a kill at any moment leaves the old file or the
new one, never half of one. In the target's folder, because a rename across file systems is a copy, and a copy can be cut short.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

DISK = {code for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "EFBIG", "ENODEV", "ESTALE") if (code := getattr(errno, name, None)) is not None}
"""What a disk answers when it is full, over quota, read-only or gone: no fault of what was to be written."""

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


class WriteFailed(OSError):
    """A file could not be written; what stood there before still does. The message is one line, ``errno`` that of the cause."""

    def __init__(self, path: Path, cause: OSError) -> None:
        kept = "the file of that name is as it was" if path.exists() else "nothing is left of it"
        super().__init__(f"cannot write {path}: {cause.strerror or cause}; {kept}")
        self.errno = cause.errno


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A stream whose content becomes ``path`` when the block ends without an error; otherwise ``path`` stays as it was.

    Raises:
        WriteFailed: if the disk is full or read-only, or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        # On a read-only disk the removal fails like the write did; the first error is the one to tell.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, WriteFailed) and error.errno in {*DISK, errno.EACCES, errno.EPERM}:
            raise WriteFailed(path, error) from error
        raise
    # Without this a power cut can lose the rename. Windows cannot open folders, and does not need to.
    if os.name == "nt":
        return
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: str | Path) -> list[Path]:
    """Remove what killed writers left behind in ``folder``, at any depth: temporary files that never got their name.

    Only for a folder that no other process is writing to.

    Returns:
        The files removed.
    """
    left = [path for path in Path(folder).rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name) and path.is_file()]
    for path in left:
        path.unlink(missing_ok=True)
    return left


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
