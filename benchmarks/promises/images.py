"""Row 9: no bad image is scored in silence."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.promises.base import Outcome, apart, tally


def bad(count: int, folder: Path) -> Outcome:
    """Every kind of bad file among good ones, in memory and decoded later: named, left out on request; NaN and infinity in tensors: named."""
    return apart(_bad, count, folder, log=folder / "bad.log")


def kinds(good: bytes, jpeg: bytes) -> dict[str, tuple[str, Callable[[Path], object], bool]]:
    """Name -> (file name, writer, whether Pillow converts it)."""
    from PIL import Image

    transparent = Image.new("RGBA", (40, 40), (200, 10, 10, 255))
    transparent.putpixel((3, 3), (0, 0, 255, 0))
    palette = Image.new("P", (40, 40))
    palette.info["transparency"] = 0

    def bomb(path: Path) -> None:
        # 20,000 x 20,000 pixels in a few hundred kilobytes.
        path.write_bytes(png(20_000, 20_000, 8, 0, zlib.compress(b"\0" * (20_001 * 200), 9)))

    return {
        "empty": ("x.png", lambda path: path.write_bytes(b""), False),
        "text": ("x.png", lambda path: path.write_text("not an image"), False),
        "web page": ("x.jpg", lambda path: path.write_text("<!doctype html><html></html>"), False),
        "cut off (PNG)": ("x.png", lambda path: path.write_bytes(good[: len(good) // 2]), False),
        "cut off (PNG), last bytes": ("x.png", lambda path: path.write_bytes(good[:-6]), False),
        "cut off (JPEG)": ("x.jpg", lambda path: path.write_bytes(jpeg[: len(jpeg) // 2]), False),
        "flipped byte (PNG)": ("x.png", lambda path: path.write_bytes(good[: len(good) // 2] + b"\xff\x00" + good[len(good) // 2 + 2 :]), False),
        "16 bits, grey": ("x.png", lambda path: path.write_bytes(deep(0, 1)), False),
        "16 bits, colour": ("x.png", lambda path: path.write_bytes(deep(2, 3)), False),
        "16 bits, alpha": ("x.png", lambda path: path.write_bytes(deep(6, 4)), False),
        "floats": ("x.tiff", lambda path: Image.new("F", (40, 40)).save(path), False),
        "integers": ("x.tiff", lambda path: Image.new("I", (40, 40)).save(path), False),
        "bomb": ("x.png", bomb, False),
        "huge": ("x.png", lambda path: path.write_bytes(png(10_000, 10_000, 1, 0, b"")), False),
        "alpha": ("x.png", transparent.save, True),
        "alpha in a palette": ("x.png", lambda path: palette.save(path, transparency=0), True),
        "CMYK": ("x.jpg", lambda path: Image.new("CMYK", (40, 40), (1, 2, 3, 4)).save(path), True),
        "a folder": ("x.png", lambda path: path.mkdir(), False),
    }


def chunk(kind: bytes, data: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, data: bytes) -> bytes:
    """A PNG file by hand."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deep(colour: int, channels: int) -> bytes:
    """A PNG of 16 bits per channel, mid grey."""
    rows = (b"\0" + struct.pack(">H", 32768) * 4 * channels) * 4
    return png(4, 4, 16, colour, zlib.compress(rows))


def _bad(count: int, folder: Path) -> Outcome:
    import io

    import numpy as np
    import torch
    from PIL import Image

    from gatewatt.data import FolderData

    source = np.random.default_rng(9)
    results: list[str | None] = []
    buffer, buffer_jpeg = io.BytesIO(), io.BytesIO()
    picture = Image.fromarray(source.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    picture.save(buffer, "png")
    picture.save(buffer_jpeg, "jpeg")
    everything = kinds(buffer.getvalue(), buffer_jpeg.getvalue())
    for number, (name, (file, write, convertible)) in enumerate(list(everything.items())[:count]):
        root = folder / f"images-{number}"
        for index in range(4):
            path = root / "test" / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
        write(root / "test" / "a" / file)
        for in_memory in (True, False):
            results += [
                f"{name}, in memory {in_memory}: {wrong}" if wrong else None for wrong in judged(FolderData, root, file, name, in_memory, convertible)
            ]
    results += tensors(torch)
    return tally(
        results, f"{min(count, len(everything))} kinds of files, in memory and decoded later; NaN and infinity in pixels, weights and scores"
    )


def judged(data: Any, root: Path, file: str, name: str, in_memory: bool, convertible: bool) -> list[str | None]:
    """What each choice of ``on_bad`` does with one bad file among four good ones."""

    def ids(on_bad: str) -> list[int]:
        module = data(str(root), size=32, in_memory=in_memory, eval_batch_size=2, on_bad=on_bad)
        module.setup("test")
        return [index for batch in module.test_dataloader() for index in batch.ids.tolist()]

    wrong: list[str | None] = []
    if name == "a folder":
        # Not a file at all: it is no image of the set.
        return [None if ids("error") == [0, 1, 2, 3] else "counted as an image"]
    for on_bad in ("error", "convert"):
        try:
            seen = ids(on_bad)
        except ValueError as error:
            named = file in str(error) and "\n" not in str(error)
            expected = on_bad == "error" or not convertible
            wrong.append(None if named and expected else f"on_bad {on_bad}: {error}")
        else:
            wrong.append(None if on_bad == "convert" and convertible and seen == [0, 1, 2, 3, 4] else f"on_bad {on_bad}: scored in silence")
    wrong.append(None if ids("skip") == [0, 1, 2, 3] else "on_bad skip: not left out")
    return wrong


def tensors(torch: Any) -> list[str | None]:
    """NaN and infinity in pixels, weights and scores, through the steps that record."""
    from gatewatt.attacks import GradMDM
    from gatewatt.data import Batch
    from gatewatt.networks import SkipNet
    from gatewatt.tasks import DynamicTraining, EnergyAttackEvaluation

    results: list[str | None] = []
    for value in (float("nan"), float("inf")):
        images = torch.rand(3, 3, 32, 32)
        images[1, 0, 5, 5] = value
        batch = Batch(images, torch.zeros(3, dtype=torch.long), torch.arange(3))
        sound = batch._replace(images=torch.rand(3, 3, 32, 32))
        broken, blind = SkipNet(8, width=4).eval(), SkipNet(8, width=4).eval()
        broken.trunk.head.weight.data[0, 0] = value
        # A gate that compares with a score of NaN says no, so the network would look superbly efficient.
        next(blind.gating.parameters()).data.fill_(float("nan"))
        for what, network, given in (("pixels", SkipNet(8, width=4).eval(), batch), ("weights", broken, sound), ("scores", blind, sound)):
            attacked = EnergyAttackEvaluation(network, GradMDM(steps=1), channels_last=False)
            trained = DynamicTraining(network, channels_last=False)
            network.eval()
            for task, step in ((attacked, "test_step"), (trained, "validation_step")):
                try:
                    # Priced on a sound image: what arrives later is what is looked at.
                    task.on_after_batch_transfer(sound, 0)
                    getattr(task, step)(given, 0)
                except ValueError as error:
                    results.append(None if "image" in str(error) and "NaN" in str(error) else f"{value} in {what}, {step}: {error}")
                else:
                    results.append(f"{value} in {what}, {step}: recorded")
                if getattr(task, "rows", []):
                    results.append(f"{value} in {what}, {step}: rows were kept")
        try:
            GradMDM(steps=1)(SkipNet(8, width=4).eval(), images)
        except ValueError as error:
            results.append(None if "image 1" in str(error) else str(error))
        else:
            results.append(f"an image with {value} was attacked")
    return results
