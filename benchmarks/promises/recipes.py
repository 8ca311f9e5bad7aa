"""Row 7: whatever is wrong with a recipe, one line names file and key, and nothing runs."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.promises.base import Outcome, apart, tally

LINES = [
    "model:",
    "  class_path: gatewatt.tasks.DynamicTraining",
    "  init_args:",
    "    network:",
    "      class_path: gatewatt.networks.SkipNet",
    "      init_args:",
    "        depth: 8",
    "        num_classes: 10",
    "        width: 4",
    "    objective:",
    "      class_path: gatewatt.objectives.ComputeTarget",
    "      init_args:",
    "        target: 0.7",
    "    optimization:",
    "      class_path: gatewatt.tasks.Optimization",
    "      init_args:",
    "        lr: 1e-2",
    "data:",
    "  class_path: gatewatt.data.DigitsData",
    "  init_args:",
    "    batch_size: 16",
    "    val_images: 20",
    "trainer:",
    "  max_steps: 1",
    "  accelerator: cpu",
    "  enable_progress_bar: false",
]
"""A sound recipe; every case spoils it in one place."""
SECONDS = 10.0  # what an answer may take at most


class Case(NamedTuple):
    """A malformed recipe.

    Attributes:
        name: what is wrong with it.
        content: the file.
        key: what the error must name beside the file; empty where there is no key to name.
    """

    name: str
    content: bytes
    key: str = ""


def cases() -> list[Case]:
    """All malformed recipes, the most different ones first."""
    systematic = list(spoilt_lines())
    # Every kind of spoiling comes up early, whatever the number of cases asked for.
    kinds: dict[str, list[Case]] = {}
    for case in systematic:
        kinds.setdefault(case.name.split(" of ")[0], []).append(case)
    mixed = [case for turn in range(max(map(len, kinds.values()))) for group in kinds.values() for case in group[turn : turn + 1]]
    return [*structural(), *mixed]


def spoilt_lines() -> Iterator[Case]:
    """Each field of the recipe, misspelt, of another type, doubled, with a hostile tag, and not finite."""
    for index, line in enumerate(LINES):
        key, _, value = line.strip().partition(": ")
        key = key.removesuffix(":")
        indent = line[: len(line) - len(line.lstrip())]

        def replaced(*new: str, at: int = index) -> bytes:
            return "\n".join([*LINES[:at], *new, *LINES[at + 1 :], ""]).encode()

        misspelt = f"{key[:-1]}x" if key not in ("class_path", "init_args") else f"{key}x"
        yield Case(
            f"misspelt name of {key} ({index})", replaced(line.replace(key, misspelt, 1)), "" if key in ("class_path", "init_args") else misspelt
        )
        if not value:
            continue
        yield Case(f"double of {key} ({index})", replaced(line, line), key)
        yield Case(f"python tag of {key} ({index})", replaced(f"{indent}{key}: !!python/object/apply:os.system ['touch executed']"), key)
        if key != "class_path":
            yield Case(f"mapping instead of {key} ({index})", replaced(f"{indent}{key}: {{a: 1}}"), key)
        else:
            yield Case(f"command instead of {key} ({index})", replaced(f"{indent}{key}: os.system"), "")
        if value.replace("e-", "").replace(".", "").isdecimal():
            yield Case(f"NaN of {key} ({index})", replaced(f"{indent}{key}: .nan"), key)
            yield Case(f"infinity of {key} ({index})", replaced(f"{indent}{key}: 1e999"), key)
            yield Case(f"text instead of {key} ({index})", replaced(f"{indent}{key}: plenty"), key)
            yield Case(f"negative of {key} ({index})", replaced(f"{indent}{key}: -7"), key)


def structural() -> Iterator[Case]:
    """Files that are no recipes, or hurt whoever reads them."""
    sound = "\n".join(LINES) + "\n"
    laughs = "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    laughs += "\n".join(f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True))
    texts = {
        "empty": "",
        "comment only": "# nothing\n",
        "list": "- a\n- b\n",
        "word": "hello\n",
        "two documents": "a: 1\n---\nb: 2\n",
        "unclosed bracket": f"{sound}x: [1, 2\n",
        "tab": "model:\n\tclass_path: x\n",
        "undefined alias": "model: *nowhere\n",
        "recursive alias": "model: &m\n  class_path: *m\n",
        "billion laughs": laughs,
        "deep nesting": "model: " + "[" * 3000 + "]" * 3000 + "\n",
        "huge integer": "trainer:\n  max_steps: " + "9" * 5000 + "\n",
        "cycle": "extends: malformed.yaml\n",
        "missing parent": "extends: nowhere-at-all.yaml\n",
        "parent on the net": "extends: https://example.org/a.yaml\n",
        "parent is a number": "extends: [3]\n",
        "config key": f"config: base.yaml\n{sound}",
        "verb key": "fit:\n  model: {}\n",
        "merge key": "a: &a {b: 1}\nmodel:\n  <<: *a\n",
        "python name": "model: !!python/name:os.system ''\n",
        "python module": "model: !!python/module:os ''\n",
        "binary tag": "model: !!binary aGVsbG8=\n",
        "unknown group": f"{sound}notes: many\n",
        "no task": "trainer: {max_steps: 1}\n",
        "seed too large": f"{sound}seed_everything: 99999999999999\n",
        "checkpoint on the net": f"{sound}ckpt_path: https://example.org/a.ckpt\n",
        "missing checkpoint": f"{sound}ckpt_path: nowhere.ckpt\n",
        "root of the trainer": sound.replace("  max_steps: 1", "  max_steps: 1\n  default_root_dir: here"),
        "foreign writer": sound.replace("  max_steps: 1", "  max_steps: 1\n  plugins: lightning.pytorch.plugins.TorchCheckpointIO"),
        "resume at will": f"{sound}resume: perhaps\n",
    }
    for name, text in texts.items():
        yield Case(name, text.encode())
    yield Case("pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00")
    yield Case("zip", b"PK\x03\x04\xff\xfe\x00")
    yield Case("UTF-16", sound.encode("utf-16"))
    yield Case("a megabyte", sound.encode() + b"#" * 1_000_001)
    yield Case("null bytes", b"\0" * 100)
    yield Case("control character", b"model: \x07\n")


def malformed(count: int, folder: Path, *, timed: bool = True) -> Outcome:
    """``count`` malformed recipes: one line on stderr with file and key, exit code 2, under ten seconds, nothing run or written.

    Args:
        count: recipes.
        folder: where to work.
        timed: judge the seconds too.
    """
    return apart(_malformed, count, folder, timed, log=folder / "malformed.log")


def _malformed(count: int, folder: Path, timed: bool) -> Outcome:
    from gatewatt.cli import main

    os.chdir(folder)
    results, slowest, said = [], 0.0, {}
    for case in cases()[:count]:
        Path("malformed.yaml").write_bytes(case.content)
        out, err = io.StringIO(), io.StringIO()
        begun = time.monotonic()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code: int | str = main(["fit", "-c", "malformed.yaml"])
        # A traceback is what must not be.
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - begun
        slowest = max(slowest, seconds)
        line = err.getvalue()
        said[case.name] = line.rstrip("\n")
        faults = [
            *([f"exit code {code}"] if code != 2 else []),
            *([f"{line.count(chr(10))} lines"] if line.count("\n") != 1 else []),
            *(["the file is not named"] if "malformed.yaml" not in line else []),
            *([f"{case.key} is not named"] if case.key not in line else []),
            *(["it printed something"] if out.getvalue() else []),
            *(["something ran"] if Path("executed").exists() or Path("runs").exists() else []),
            *([f"{seconds:.1f} s"] if timed and seconds >= SECONDS else []),
        ]
        results.append(f"{case.name}: {', '.join(faults)}: {line.strip()[:200]}" if faults else None)
    Path("malformed.json").write_text(json.dumps(said, indent=1))
    return tally(results, f"slowest answer {slowest:.1f} s, imports not counted")
