"""Row 13: shipped weights give the figures of their cards again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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


def repeated(count: int, folder: Path, data: Path | None = None) -> Outcome:
    """Test the first ``count`` shipped checkpoints by the recipe of their card; every figure to two decimals.

    Args:
        count: checkpoints.
        folder: where to work.
        data: folder of the data set, as recipes take it by ``--data.root``.
    """
    from gatewatt.shipped import find_checkpoint, shipped

    if data is None:
        raise NotMeasured("needs the data set: --data FOLDER")
    results: list[str | None] = []
    measured = []
    for name in shipped("checkpoints", ".safetensors")[:count]:
        recipes = [recipe for recipe in shipped("recipes", ".yaml") if recipe.startswith("card-") and name.startswith(recipe.removeprefix("card-"))]
        if not recipes:
            results.append(f"{name}: there is no recipe card-...")
            continue
        results.append(compared(find_checkpoint(name), [max(recipes, key=len), "--data.root", str(data.resolve())], folder))
        measured.append(name)
    return tally(results, ", ".join(measured))


def compared(weights: Path, recipe: list[str], folder: Path) -> str | None:
    """Measure a copy of a checkpoint, and compare its card with that of the original."""
    copy = folder / "copy" / weights.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    for file in (weights, weights.with_suffix(".json")):
        shutil.copy(file, copy.parent / file.name)
    expected = json.loads(weights.with_suffix(".json").read_text()).get("measured")
    if not expected:
        return f"{weights.stem}: the card has no figures"
    log = folder / f"{weights.stem}.log"
    code = finish(["test", "-c", *recipe, "--model.checkpoint", str(copy), "--run", f"card-{weights.stem}"], folder, log, timeout=4 * 3600)
    if code != 0:
        return f"{weights.stem}: exit code {code}: {log.read_text(errors='replace')[-500:]}"
    found = json.loads(copy.with_suffix(".json").read_text())["measured"]
    wrong = [
        f"{key} {found[key]} instead of {expected[key]}"
        for key, scale in SCALES.items()
        if expected.get(key) is not None and (found[key] is None or round(scale * found[key], 2) != round(scale * expected[key], 2))
    ]
    return f"{weights.stem}: {', '.join(wrong)}" if wrong else None
