"""Row 13: shipped weights give the figures of their cards again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.promises.base import NotMeasured, Outcome, finish, tally

# Figures of a card, and what two decimals of them mean: percent for shares, millions for FLOPs.
SCALES = {
    "accuracy_clean": 100,
    "accuracy_adversarial": 100,
    "flops_dense": 1e-6,
    "flops_clean": 1e-6,
    "recovery_percent": 1,
    "recovery_8bit_percent": 1,
    "psnr_db": 1,
}
VALIDATION_SCALES = {"val/accuracy": 100, "val/flops_clean": 1e-6, "val/flops_fraction": 100}
EMBEDDED = ("digits",)  # data sets that need no folder


def repeated(count: int, folder: Path, data: Path | None = None) -> Outcome:
    """The first ``count`` shipped checkpoints: validated by the recipe on their card, attacked by that of their figures; all to two decimals.

    Args:
        count: checkpoints.
        folder: where to work.
        data: folder of the CIFAR-10 copy, as recipes take it by ``--data.root``; without it the checkpoints that need it are left out.
    """
    from gatewatt.shipped import find_checkpoint, shipped

    results: list[str | None] = []
    measured, left_out = [], []
    for name in shipped("checkpoints", ".safetensors")[:count]:
        weights = find_checkpoint(name)
        card = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
        if card["dataset"] not in EMBEDDED and data is None:
            left_out.append(name)
            continue
        root = [] if data is None or card["dataset"] in EMBEDDED else ["--data.root", str(data.resolve())]
        results.append(validated(weights, root, folder))
        measured.append(name)
        recipes = [recipe for recipe in shipped("recipes", ".yaml") if recipe.startswith("card-") and name.startswith(recipe.removeprefix("card-"))]
        if recipes:
            results.append(compared(weights, [max(recipes, key=len), *root], folder))
            measured[-1] += " (attacked too)"
        elif card.get("measured"):
            results.append(f"{name}: its card has figures of an attack, and there is no recipe card-... to repeat them")
    if not results:
        raise NotMeasured("needs the data set: --data FOLDER")
    return tally(results, ", ".join(measured), missing=", ".join(left_out))


def copied(weights: Path, folder: Path) -> Path:
    """A copy of a checkpoint and its card that a test may write to."""
    copy = folder / "copy" / weights.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    for file in (weights, weights.with_suffix(".json")):
        shutil.copy(file, copy.parent / file.name)
    return copy


def validated(weights: Path, root: list[str], folder: Path) -> str | None:
    """Validate a checkpoint by the recipe that its card keeps, and compare with the validation that the card reports."""
    card = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))
    expected = {key: value for key, value in (card.get("validation") or {}).items() if key in VALIDATION_SCALES}
    if not expected or "recipe" not in card:
        return f"{weights.stem}: the card has no validation or no recipe"
    recipe, run, log = folder / f"{weights.stem}.yaml", f"validate-{weights.stem}", folder / f"{weights.stem}-validation.log"
    recipe.write_text(card["recipe"], encoding="utf-8")
    # What calibrates, attacks or exports while it trains has done its part: the weights hold what came of it.
    flags = ["--model.checkpoint", str(weights), "--trainer.callbacks", "null", "--trainer.precision", "32-true", *root]
    code = finish(["validate", "-c", recipe.name, *flags, "--run", run], folder, log, timeout=4 * 3600)
    if code != 0:
        return f"{weights.stem}, validated: exit code {code}: {log.read_text(errors='replace')[-500:]}"
    rows = (folder / "runs" / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    wrong = differing(json.loads(rows[-1]), expected, VALIDATION_SCALES)
    return f"{weights.stem}, validated: {wrong}" if wrong else None


def compared(weights: Path, recipe: list[str], folder: Path) -> str | None:
    """Measure a copy of a checkpoint, and compare its card with that of the original."""
    copy = copied(weights, folder)
    expected = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8")).get("measured")
    if not expected:
        return f"{weights.stem}: the card has no figures"
    log = folder / f"{weights.stem}.log"
    code = finish(["test", "-c", *recipe, "--model.checkpoint", str(copy), "--run", f"card-{weights.stem}"], folder, log, timeout=4 * 3600)
    if code != 0:
        return f"{weights.stem}: exit code {code}: {log.read_text(errors='replace')[-500:]}"
    wrong = differing(json.loads(copy.with_suffix(".json").read_text(encoding="utf-8"))["measured"], expected, SCALES)
    return f"{weights.stem}: {wrong}" if wrong else None


def differing(found: Mapping[str, Any], expected: Mapping[str, Any], scales: Mapping[str, float]) -> str:
    """Figures that differ in their first two decimals, as a text; empty where none does."""
    return ", ".join(
        f"{key} {found.get(key)} instead of {expected[key]}"
        for key, scale in scales.items()
        if expected.get(key) is not None and (found.get(key) is None or round(scale * found[key], 2) != round(scale * expected[key], 2))
    )
