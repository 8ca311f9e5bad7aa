"""Row 8: damaged, hostile and foreign checkpoints are refused in one line, and nothing in them runs."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.promises.base import Outcome, apart, tally


class Bomb:
    """Pickles into a call that makes a file."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def damaged(count: int, folder: Path) -> Outcome:
    """Weights and training checkpoints, each cut off at ``count`` places and with ``count`` single flipped bytes; pickles, NaN, and more."""
    return apart(_damaged, count, folder, log=folder / "damaged.log")


def _damaged(count: int, folder: Path) -> Outcome:
    import torch

    from gatewatt.callbacks.saving import AtomicCheckpointIO
    from gatewatt.networks import SkipNet
    from gatewatt.networks.checkpoint import load, save

    torch.manual_seed(0)
    marker, chance = folder / "executed", random.Random(8)
    weights, training = folder / "sound.safetensors", folder / "sound.ckpt"
    network = SkipNet(8, width=4)
    save(network, weights, card={})
    AtomicCheckpointIO().save_checkpoint({"state_dict": network.state_dict(), "global_step": 3}, training)
    load(weights)
    AtomicCheckpointIO().load_checkpoint(training)
    results: list[str | None] = []

    def refuse(name: str, reader: Callable[[Path], object], path: Path) -> None:
        try:
            reader(path)
        except ValueError as error:
            line = str(error)
            wrong = "more than one line" if "\n" in line else None if path.name in line or path.stem in line else "the file is not named"
        # A traceback of any other kind is what must not be.
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        else:
            wrong = "accepted"
        results.append(f"{name}: {wrong}" if wrong else "something was executed" if marker.exists() else None)

    def spoil(name: str, reader: Callable[[Path], object], sound: Path, change: Callable[[bytes], bytes]) -> None:
        path = folder / f"spoilt{sound.suffix}"
        path.write_bytes(change(sound.read_bytes()))
        if sound.suffix == ".safetensors":
            path.with_suffix(".json").write_bytes(sound.with_suffix(".json").read_bytes())
        refuse(name, reader, path)

    for reader, sound in ((load, weights), (AtomicCheckpointIO().load_checkpoint, training)):
        size = sound.stat().st_size
        edges = [0, 1, 7, 8, 9, size // 2, size - 1, size - 2, size - 22, size - 80, size - 82, size - 102, size - 103]
        for place in [*edges, *(chance.randrange(size) for _ in range(count))][:count]:
            spoil(f"{sound.suffix} cut off at byte {place}", reader, sound, lambda data, place=place: data[:place])
        for place in [*edges[:-1], *(chance.randrange(size) for _ in range(count))][:count]:
            bit = 1 << chance.randrange(8)
            spoil(
                f"{sound.suffix} with bit {bit} of byte {place % size} flipped",
                reader,
                sound,
                lambda data, place=place, bit=bit: flipped(data, place, bit),
            )

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        bomb = pickle.dumps(Bomb(str(marker)), protocol)
        spoil(f"weights that are a pickle, protocol {protocol}", load, weights, lambda data, bomb=bomb: bomb)
        spoil(
            f"training checkpoint that is a pickle, protocol {protocol}", AtomicCheckpointIO().load_checkpoint, training, lambda data, bomb=bomb: bomb
        )
    for zipped in (True, False):
        path = folder / "bomb.ckpt"
        torch.save({"state_dict": {}, "bomb": Bomb(str(marker))}, path, _use_new_zipfile_serialization=zipped)
        refuse(f"training checkpoint with a bomb, zipped: {zipped}", AtomicCheckpointIO().load_checkpoint, path)
        path.rename(folder / "bomb.safetensors")
        refuse(f"weights with a bomb, zipped: {zipped}", load, folder / "bomb.safetensors")
    # The writer vouches for what is inside: unpickling it must be refused all the same.
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "bomb": Bomb(str(marker))}, folder / "sealed-bomb.ckpt")
    refuse("sealed training checkpoint with a bomb", AtomicCheckpointIO().load_checkpoint, folder / "sealed-bomb.ckpt")

    for name, other in {"width": {"width": 5}, "depth": {"depth": 14}, "gate": {"gate": "feedforward1"}, "class": {"num_classes": 11}}.items():
        path = folder / f"other-{name}.safetensors"
        path.write_bytes(weights.read_bytes())
        card = json.loads(weights.with_suffix(".json").read_text())
        card["arguments"] |= other
        path.with_suffix(".json").write_text(json.dumps(card))
        refuse(f"weights whose card names another {name}", load, path)
    for value in (float("nan"), float("inf")):
        import safetensors.torch

        tensors = safetensors.torch.load(weights.read_bytes())
        next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = value
        path = folder / "not-finite.safetensors"
        path.write_bytes(safetensors.torch.save(tensors))
        card = {**json.loads(weights.with_suffix(".json").read_text()), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        path.with_suffix(".json").write_text(json.dumps(card))
        refuse(f"weights that hold {value}", load, path)
    for address in ("https://example.org/a.safetensors", "s3://bucket/a.safetensors", "file:///etc/a.safetensors"):
        refuse(f"weights at {address}", lambda path, address=address: load(address), Path("a.safetensors"))
    load(weights)
    kinds = "weights and training checkpoints cut off and with flipped bits, pickles of all protocols, bombs, other architectures, NaN, addresses"
    return tally(results, kinds)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """The content with one bit changed."""
    changed = bytearray(data)
    changed[place % len(data)] ^= bit
    return bytes(changed)
