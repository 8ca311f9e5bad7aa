"""Files are written whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import gatewatt
from gatewatt.files import WriteFailed, replacing, sweep, write_atomically, write_new, write_text


def test_the_old_content_stands_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with replacing(path) as stream:
        stream.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_write_leaves_the_old_content_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as stream:
        stream.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf8_with_bare_newlines_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a" / "b" / "x.csv", "\u03b3,1\n")
    assert path.read_bytes() == b"\xce\xb3,1\n"


def test_a_result_is_never_overwritten(tmp_path: Path) -> None:
    write_new(tmp_path / "x", "first")
    with pytest.raises(FileExistsError, match="results are never overwritten"):
        write_new(tmp_path / "x", "second")
    assert (tmp_path / "x").read_text() == "first"


def test_a_written_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").touch()
    write_atomically(tmp_path / "x", b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    script = """
        import sys
        from pathlib import Path
        from gatewatt.files import write_atomically
        for round in range(10**9):
            write_atomically(Path(sys.argv[1]), bytes([round % 256]) * 3_000_000)
    """
    # The child must find the package also in a checkout that is not installed.
    environment = {**os.environ, "PYTHONPATH": str(Path(gatewatt.__file__).parents[1])}
    for _ in range(3):
        path.unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(path)], env=environment)
        while not path.exists():
            assert process.poll() is None
        process.kill()
        process.wait()
        content = path.read_bytes()
        assert len(content) == 3_000_000
        assert len(set(content)) == 1


def test_a_full_disk_is_one_line_that_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteFailed) as failed:
        write_atomically(tmp_path / "x", b"new")
    assert str(failed.value) == f"cannot write {tmp_path / 'x'}: No space left on device; nothing is left of it"
    assert failed.value.errno == errno.ENOSPC
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(WriteFailed, match="the file of that name is as it was"):
        write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"


def test_what_killed_writers_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    left = [tmp_path / ".x.ckpt.123.tmp", tmp_path / "a" / ".metrics.csv.7.tmp"]
    kept = [tmp_path / "x.ckpt", tmp_path / "x.tmp", tmp_path / ".x.tmp", tmp_path / ".hidden"]
    for path in (*left, *kept):
        path.touch()
    assert sorted(sweep(tmp_path)) == sorted(left)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)
