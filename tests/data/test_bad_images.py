"""Files that must not be scored are found at set-up: named, left out, or converted, as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gatewatt.data import FolderData
from gatewatt.data.folder import examine, read_image

Write = Callable[[Path], object]


def picture(mode: str = "RGB", side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).convert(mode)


def see_through() -> Image.Image:
    image = picture("RGBA")
    image.putpixel((3, 3), (1, 2, 3, 0))
    return image


def cut(path: Path, share: float) -> None:
    picture().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


BAD: dict[str, tuple[str, Write, str, bool]] = {
    "empty": ("bad.png", lambda path: path.write_bytes(b""), "cannot be read as an image", False),
    "text": ("bad.jpg", lambda path: path.write_text("hello"), "cannot be read as an image", False),
    "cut off": ("bad.png", lambda path: cut(path, 0.5), "cannot be read as an image", False),
    "cut off JPEG": ("bad.jpg", lambda path: cut(path, 0.5), "cannot be read as an image", False),
    "integers": ("bad.tiff", lambda path: Image.new("I", (40, 40)).save(path), "more than 8 bits per channel", False),
    "transparent": ("bad.png", lambda path: see_through().save(path), "has transparent pixels", True),
    "CMYK": ("bad.jpg", lambda path: picture("CMYK").save(path), "is CMYK", True),
}
"""Name -> file, writer, what the error says, whether Pillow converts it."""


@pytest.fixture(params=BAD)
def bad(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str, bool]:
    """Four good images and a bad one between them."""
    file, write, message, convertible = BAD[request.param]
    for index, name in enumerate(("a.png", "c.png", "d.jpg", "e.png")):
        path = tmp_path / "set" / "test" / "xy"[index // 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    write(tmp_path / "set" / "test" / "x" / file)
    return tmp_path / "set", file, message, convertible


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_bad_file_is_refused_at_set_up_by_name(bad: tuple[Path, str, str, bool], in_memory: bool) -> None:
    root, file, message, _ = bad
    with pytest.raises(ValueError, match=message) as refused:
        FolderData(str(root), in_memory=in_memory).setup("test")
    assert str(refused.value).startswith(f"{root / 'test' / 'x' / file}: ")
    assert "on_bad" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_bad_file_is_left_out_on_request_and_said_so(bad: tuple[Path, str, str, bool], in_memory: bool, capsys: pytest.CaptureFixture[str]) -> None:
    root, file, _, _ = bad
    data = FolderData(str(root), in_memory=in_memory, on_bad="skip", eval_batch_size=3)
    data.setup("test")
    said = capsys.readouterr().err
    assert said.startswith("gatewatt: 1 of 5 test images left out (1 ")
    assert said.endswith(f": {file}\n")
    assert data.left_out == {"test": [str(root / "test" / "x" / file)]}
    batches = list(data.test_dataloader())
    assert [index for batch in batches for index in batch.ids.tolist()] == [0, 1, 2, 3]
    assert [label for batch in batches for label in batch.labels.tolist()] == [0, 0, 1, 1]
    # The good ones are what they are without the bad one.
    (root / "test" / "x" / file).unlink()
    alone = list(FolderData(str(root), in_memory=in_memory, eval_batch_size=3).test_dataloader())
    assert all((one.images == other.images).all() for one, other in zip(batches, alone, strict=True))


@pytest.mark.parametrize("in_memory", [True, False])
def test_conversion_takes_what_pillow_converts_and_nothing_else(
    bad: tuple[Path, str, str, bool], in_memory: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    root, _, message, convertible = bad
    data = FolderData(str(root), in_memory=in_memory, on_bad="convert")
    if not convertible:
        with pytest.raises(ValueError, match=message):
            data.setup("test")
        return
    data.setup("test")
    assert f"1 of 5 test images converted with a loss (1 {message}" in capsys.readouterr().err
    assert sum(len(batch.ids) for batch in data.test_dataloader()) == 5


def test_several_bad_files_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    for index in range(6):
        path = tmp_path / "test" / "x" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path) if index % 2 else path.write_text("no")
    with pytest.raises(ValueError, match=r"0\.png: cannot be read .*, or set on_bad: skip \(and 2 more of 6 images\)"):
        FolderData(str(tmp_path)).setup("test")


def test_a_set_of_bad_files_alone_is_refused_even_when_they_are_to_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "test" / "x" / "a.png"
    path.parent.mkdir(parents=True)
    path.write_text("no")
    with pytest.raises(ValueError, match="none of the 1 test images is left"):
        FolderData(str(tmp_path), on_bad="skip").setup("test")


def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_bad must be error, skip or convert, got 'ignore'"):
        FolderData(str(tmp_path), on_bad="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
@pytest.mark.parametrize("whole", [True, False])
def test_ordinary_images_have_no_fault(mode: str, whole: bool, tmp_path: Path) -> None:
    picture(mode).save(tmp_path / "x.png")
    assert examine(str(tmp_path / "x.png"), whole=whole) is None


@pytest.mark.parametrize("end", [b"", b"a camera's own data" * 50])
def test_what_a_camera_appends_is_no_fault(end: bytes, tmp_path: Path) -> None:
    picture().save(tmp_path / "x.jpg")
    with (tmp_path / "x.jpg").open("ab") as stream:
        stream.write(end)
    assert examine(str(tmp_path / "x.jpg"), whole=False) is None


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gatewatt.data.folder.MAX_PIXELS", 1000)
    picture(side=32).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"x\.png: cannot be read as an image \(its 32 x 32 pixels would fill the memory\)"):
        read_image(tmp_path / "x.png")
