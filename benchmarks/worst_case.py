"""Is AutoEnergy's worst case the worst? Every single attack at equal radius on the same images, and GradMDM at equal recovery.

    python benchmarks/worst_case.py [--checkpoints NAME ...] [--data FOLDER] [--images 100] [--steps 100] [--norms linf l2]
    python benchmarks/worst_case.py --render

First table: at two radii of each norm the whole ensemble; its members alone; PGD with as many gradients as the whole ensemble; GradMDM's loss and
masking inside the ball; DeepSloth with its own number of steps (its substitute for halting where there are no exits); noise. An attack with
gradients has `--steps` of them unless its row says otherwise, the random search twice as many queries.

Second table: GradMDM as published, in its tanh space, and the smallest radius at which AutoEnergy recovers as much, found by bisection over
quarters of an octave (1.5 dB each).

FOLDER holds test/<class>/* of CIFAR-10, for checkpoints trained on it; digits are embedded. Every run leaves summary.json and records.csv in
a folder of its own below --out; a finished one is not repeated, so an interrupted benchmark goes on where it stopped. WORST_CASE.md and the two
CSV files are rendered from these files alone.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from attack_run import emptied, run_attack
from families import data_of

from gatewatt import load
from gatewatt.attacks import Attack, AutoEnergy, Ball, DeepSloth, GradMDM, L2Ball, LinfBall, NoGradientError, Noise, ProjectedAttack
from gatewatt.attacks.auto import LONG, MEMBERS, member
from gatewatt.cli.quiet import quiet
from gatewatt.data import ImageData
from gatewatt.files import write_text
from gatewatt.metrics.estimates import Column, below_full, bootstrap_interval, bootstrap_sums, percentile_interval, ratio_percent, recovery_percent
from gatewatt.metrics.record import ImageRecord, columns_of, read_records
from gatewatt.shipped import shipped

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = ("linf", "l2")
RADII: dict[Norm, tuple[float, ...]] = {"linf": (4 / 255, 8 / 255), "l2": (0.5, 1.0)}
GRIDS: dict[Norm, tuple[float, ...]] = {
    "linf": tuple(2 ** (quarter / 4) / 255 for quarter in range(-8, 24)),
    "l2": tuple(2 ** (quarter / 4) for quarter in range(-20, 12)),
}
"""Radii among which the smallest is sought at which AutoEnergy recovers what GradMDM does; :data:`RADII` are among them."""
NOISES: tuple[Literal["uniform", "gaussian", "shift", "flat"], ...] = ("uniform", "gaussian", "shift", "flat")
SINGLES = (*MEMBERS, "pgd-long", "gradmdm-ball", "deepsloth", *NOISES)
"""The single attacks, by the names of their folders and rows."""
GAIN_DB = 3.0
"""By how much AutoEnergy's images are to be nearer than GradMDM's at equal recovery."""


class Settings(NamedTuple):
    """What is asked of every checkpoint.

    Attributes:
        images: test images, the same for every attack.
        steps: of an attack with gradients.
        norms: of the balls.
        gamma: GradMDM's.
        out: folder of the results.
    """

    images: int
    steps: int
    norms: tuple[Norm, ...]
    gamma: float
    out: Path


def single(name: str, norm: Norm, eps: float, steps: int, *, exits: bool, pixels: int) -> Attack:
    """A single attack of :data:`SINGLES` at a radius; ``pixels`` is 3HW."""
    space: Ball = LinfBall(eps) if norm == "linf" else L2Ball(eps)
    if name in MEMBERS:
        return member(name, space, steps)
    if name == "pgd-long":
        # As many gradients as the ensemble: the long member, three with one a step, a second one for masking, and the last descent.
        return ProjectedAttack(space=space, steps=(LONG + 5) * steps, name=name)
    if name == "gradmdm-ball":
        # Adam moves a pixel by about its rate: a quarter of the radius, as far as one pixel can use of it.
        rate = eps / 4 / (1 if norm == "linf" else math.sqrt(pixels))
        return GradMDM(gamma=0.0, steps=steps, space=space, keep="best", lr=rate)
    if name == "deepsloth":
        return DeepSloth(norm, target="exits" if exits else "halting", eps=eps)
    return Noise(name, space=space)  # type: ignore[arg-type]


def radius_text(norm: Norm, eps: float) -> str:
    """A radius as folders and tables name it: L-inf in 8-bit levels.

    Example:
        >>> radius_text("linf", 4 / 255), radius_text("l2", 0.5)
        ('linf-4', 'l2-0.5')
    """
    return f"{norm}-{255 * eps if norm == 'linf' else eps:.4g}"


def radius_of(name: str) -> tuple[Norm, float]:
    """Norm and radius of a folder's name, as :func:`radius_text` writes it."""
    norm, _, number = name.partition("-")
    return ("linf", float(number) / 255) if norm == "linf" else ("l2", float(number))


# Runs


def measured(folder: Path, checkpoint: str, attack: Attack, data: ImageData) -> list[ImageRecord] | None:
    """The records of a run, attacking only if the folder does not hold them yet; None where no gradient leads to the images.

    Raises:
        SystemExit: if the folder holds a run with other settings.
    """
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        wanted = json.loads(json.dumps(attack.settings))
        if summary["images"] != data.test_images or any(summary["attack"].get(key) != value for key, value in wanted.items()):
            raise SystemExit(f"{folder} holds a run with other settings: choose another --out, or remove it")
        return read_records(folder / "records.csv")
    try:
        with redirect_stdout(io.StringIO()):
            seconds = run_attack(load(checkpoint), checkpoint, attack, data, emptied(folder))
    except NoGradientError:
        folder.rmdir()
        return None
    records = read_records(folder / "records.csv")
    print(f"{folder}: {recovery(records):.1f} % in {seconds:.0f} s", flush=True)
    return records


def examine(checkpoint: str, data: ImageData, settings: Settings) -> None:
    """Every run of one checkpoint that is not there yet."""
    top = settings.out / checkpoint
    data.setup("test")
    sample = next(iter(data.test_dataloader())).images[:1]
    with torch.no_grad():
        exits = load(checkpoint).eval()(sample).exits is not None

    def auto(norm: Norm, eps: float) -> list[ImageRecord]:
        records = measured(top / radius_text(norm, eps) / "auto", checkpoint, AutoEnergy(norm, eps, steps=settings.steps), data)
        assert records is not None  # the random search needs no gradient
        return records

    for norm in settings.norms:
        for eps in RADII[norm]:
            auto(norm, eps)
            for name in SINGLES:
                attack = single(name, norm, eps, settings.steps, exits=exits, pixels=sample.numel())
                measured(top / radius_text(norm, eps) / name, checkpoint, attack, data)
    rival = measured(top / "gradmdm", checkpoint, GradMDM(gamma=settings.gamma, steps=settings.steps), data)
    if rival is not None and recovery(rival) > 0:
        goal = recovery(rival)
        for norm in settings.norms:
            smallest(GRIDS[norm], lambda eps, norm=norm: recovery(auto(norm, eps)) >= goal)  # type: ignore[misc]


def smallest(grid: Sequence[float], enough: Callable[[float], bool]) -> float | None:
    """The smallest value of an ascending grid that is enough, by bisection; None if the last one is not.

    Example:
        >>> asked = []
        >>> smallest(range(32), lambda value: asked.append(value) or value >= 21), len(asked)
        (21, 5)
    """
    low, high = 0, len(grid)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(grid[middle]) else (middle + 1, high)
    return grid[low] if low < len(grid) else None


# Tables


def flops_of(records: Sequence[ImageRecord]) -> tuple[Column, Column, Column]:
    """Clean, adversarial and dense MACs, each (n,)."""
    clean, adversarial, dense = columns_of(records, "flops_clean", "flops_adversarial", "flops_dense")
    return clean, adversarial, dense


def recovery(records: Sequence[ImageRecord]) -> float:
    """Ratio of sums in percent; NaN if every clean image runs everything."""
    return recovery_percent(*flops_of(records))


def points(won: Column, records: Sequence[ImageRecord]) -> tuple[float, float, float]:
    """``won`` MACs (n,) in percent of what the clean images save, with a 95 % bootstrap interval over images."""
    clean, _, dense = flops_of(records)
    sums = bootstrap_sums(np.stack([won, dense - clean], axis=1))
    value = ratio_percent(np.array([won.sum()]), np.array([(dense - clean).sum()]))[0]
    return float(value), *percentile_interval(ratio_percent(sums[:, 0], sums[:, 1]))


def interval(found: tuple[float, float, float], unit: str = "") -> str:
    """A figure with its interval."""
    value, low, high = found
    return "-" if math.isnan(value) else f"{value:.1f}{unit} ({low:.1f} to {high:.1f})"


def mean_db(values: Column) -> tuple[float, float, float]:
    """Mean of decibels (n,) with a 95 % bootstrap interval; NaN without values."""
    if len(values) == 0:
        return math.nan, math.nan, math.nan
    sums = bootstrap_sums(np.stack([values, np.ones_like(values)], axis=1))
    return float(values.mean()), *percentile_interval(sums[:, 0] / sums[:, 1])


class SingleRow(NamedTuple):
    """One attack beside the ensemble; ``ahead`` are AutoEnergy's percentage points above it, ``beaten`` the images on which it found more."""

    checkpoint: str
    norm: str
    eps: float
    attack: str
    images: int
    recovery_percent: float
    recovery_low: float
    recovery_high: float
    ahead: float
    ahead_low: float
    ahead_high: float
    beaten: int
    psnr_db: float
    seconds: float


class EqualRow(NamedTuple):
    """GradMDM against AutoEnergy at equal recovery.

    Attributes:
        checkpoint: its name.
        norm: of AutoEnergy's ball.
        recovery_gradmdm: percent.
        eps: smallest radius measured at which AutoEnergy recovers as much; NaN if none does.
        recovery_auto: percent, there.
        psnr_gradmdm: dB, mean over the images that both change.
        psnr_auto: dB, over the same images.
        gain_db: their difference with its interval, as the two after it.
        matched_gain_db: mean over the images on which GradMDM wins FLOPs, each at the smallest radius measured at which AutoEnergy wins as many.
        matched_images: their number.
        unmatched_images: images on which AutoEnergy wins fewer than GradMDM at every radius measured.
    """

    checkpoint: str
    norm: str
    recovery_gradmdm: float
    eps: float
    recovery_auto: float
    psnr_gradmdm: float
    psnr_auto: float
    gain_db: float
    gain_low: float
    gain_high: float
    matched_gain_db: float
    matched_low: float
    matched_high: float
    matched_images: int
    unmatched_images: int


def singles_of(top: Path) -> Iterator[SingleRow]:
    """The rows of one checkpoint's first table, the ensemble first, radius by radius."""
    for norm in NORMS:
        for eps in RADII[norm]:
            folder = top / radius_text(norm, eps)
            if not (folder / "auto" / "summary.json").exists():
                continue
            worst = read_records(folder / "auto" / "records.csv")
            for name in ("auto", *SINGLES):
                if not (folder / name / "summary.json").exists():
                    continue
                records = same_images(worst, read_records(folder / name / "records.csv"), folder / name)
                summary: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
                clean, adversarial, dense = flops_of(records)
                lead = flops_of(worst)[1] - adversarial
                # Rounding in the last bits of a sum is no victory.
                beaten = int((lead < -1e-9 * dense).sum())
                own = recovery(records), *bootstrap_interval(clean, adversarial, dense)
                psnr = math.nan if summary["psnr_db"] is None else float(summary["psnr_db"])
                yield SingleRow(top.name, norm, eps, name, len(records), *own, *points(lead, records), beaten, psnr, float(summary["wall_seconds"]))


def same_images(first: Sequence[ImageRecord], second: list[ImageRecord], folder: Path) -> list[ImageRecord]:
    """``second``, unless its images are others than those of ``first``.

    Raises:
        SystemExit: naming the folder.
    """
    if [row.id for row in first] != [row.id for row in second]:
        raise SystemExit(f"{folder} holds other images than the run it is compared with")
    return second


def equal_of(top: Path) -> Iterator[EqualRow]:
    """The rows of one checkpoint's second table."""
    if not (top / "gradmdm" / "summary.json").exists():
        return
    rival = read_records(top / "gradmdm" / "records.csv")
    goal, (clean, theirs, dense) = recovery(rival), flops_of(rival)
    (their_psnr,) = columns_of(rival, "psnr_db")
    for norm in NORMS:
        runs: dict[float, list[ImageRecord]] = {}
        for path in top.glob(f"{norm}-*/auto/records.csv"):
            if (path.parent / "summary.json").exists():
                runs[radius_of(path.parts[-3])[1]] = same_images(rival, read_records(path), path.parent)
        if not runs:
            continue
        reached = [eps for eps in sorted(runs) if recovery(runs[eps]) >= goal]
        psnr = {eps: columns_of(records, "psnr_db")[0] for eps, records in runs.items()}
        # Image by image; where GradMDM wins nothing, there is nothing to match.
        won = (theirs > clean) & below_full(clean, dense)
        nearest = np.full(len(rival), np.nan)
        for eps in sorted(runs, reverse=True):
            nearest = np.where(flops_of(runs[eps])[1] >= theirs, psnr[eps], nearest)
        matched = won & np.isfinite(nearest) & np.isfinite(their_psnr)
        gains = mean_db((nearest - their_psnr)[matched]), int(matched.sum()), int((won & np.isnan(nearest)).sum())
        eps = reached[0] if reached else math.nan
        own = psnr[eps] if reached else np.full(len(rival), np.nan)
        both = np.isfinite(own) & np.isfinite(their_psnr)
        yield EqualRow(
            top.name,
            norm,
            goal,
            eps,
            recovery(runs[eps]) if reached else math.nan,
            mean_db(their_psnr[both])[0],
            mean_db(own[both])[0],
            *mean_db((own - their_psnr)[both]),
            *gains[0],
            *gains[1:],
        )


def render(out: Path) -> Path:
    """Write WORST_CASE.md, worst-case.csv and equal-recovery.csv from the runs below ``out``."""
    tops = sorted(path for path in out.iterdir() if path.is_dir())
    singles, equals = [row for top in tops for row in singles_of(top)], [row for top in tops for row in equal_of(top)]
    write_csv(out / "worst-case.csv", SingleRow._fields, singles)
    write_csv(out / "equal-recovery.csv", EqualRow._fields, equals)
    write_text(out / "WORST_CASE.md", page(singles, equals))
    return out / "WORST_CASE.md"


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Header and rows; what is undefined stays empty."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row] for row in rows])
    write_text(path, stream.getvalue())


def page(singles: Sequence[SingleRow], equals: Sequence[EqualRow]) -> str:
    """Both tables and what they say of the two claims."""
    return "\n".join([*claims(singles, equals), "", *single_table(singles), "", *equal_table(equals)]) + "\n"


def claims(singles: Sequence[SingleRow], equals: Sequence[EqualRow]) -> list[str]:
    """Where the claims hold, and where they do not."""
    rivals = [row for row in singles if row.attack != "auto" and not math.isnan(row.ahead)]
    behind = [f"{row.attack} on `{row.checkpoint}` ({radius_text(*budget(row))}, {-row.ahead:.2f} points)" for row in rivals if row.ahead < 0]
    short = [
        f"`{row.checkpoint}` in {row.norm} ({'not reached' if math.isnan(row.gain_db) else f'{row.gain_db:.1f} dB'})"
        for row in equals
        if not row.gain_db >= GAIN_DB
    ]
    return [
        "# AutoEnergy's worst case",
        "",
        "Rendered by `python benchmarks/worst_case.py --render` from the records beside this page; settings are in each run's summary. Recovery is",
        "the ratio of sums, intervals are 95 % bootstrap intervals over images. *Ahead* is AutoEnergy's recovery less the attack's, paired by image,",
        "in points; *more on* counts the images on which the attack spends more FLOPs than the worst case. Radii in L-inf are 8-bit levels.",
        "",
        f"AutoEnergy recovers at least as much as the single attack in {len(rivals) - len(behind)} of {len(rivals)} comparisons"
        + (f"; not against {', '.join(behind)}." if behind else "."),
        f"It reaches GradMDM's recovery at a PSNR at least {GAIN_DB:g} dB higher in {len(equals) - len(short)} of {len(equals)} cases"
        + (f"; not on {', '.join(short)}." if short else "."),
    ]


def budget(row: SingleRow) -> tuple[Norm, float]:
    """Norm and radius of a row."""
    return ("linf" if row.norm == "linf" else "l2"), row.eps


def single_table(rows: Sequence[SingleRow]) -> list[str]:
    """The first table as Markdown."""
    head = ["checkpoint", "ball", "attack", "recovery", "ahead", "more on", "PSNR", "seconds", "images"]
    lines = []
    for row in rows:
        own = (row.recovery_percent, row.recovery_low, row.recovery_high)
        ahead = "" if row.attack == "auto" else interval((row.ahead, row.ahead_low, row.ahead_high))
        psnr = "-" if math.isnan(row.psnr_db) else f"{row.psnr_db:.1f} dB"
        place = (f"`{row.checkpoint}`", radius_text(*budget(row)), f"**{row.attack}**" if row.attack == "auto" else row.attack)
        lines.append([*place, interval(own, " %"), ahead, str(row.beaten), psnr, f"{row.seconds:.1f}", str(row.images)])
    return ["## Single attacks at equal radius", "", *markdown(head, lines, text=3)]


def equal_table(rows: Sequence[EqualRow]) -> list[str]:
    """The second table as Markdown."""
    head = [
        "checkpoint",
        "norm",
        "GradMDM",
        "AutoEnergy",
        "radius",
        "PSNR, GradMDM",
        "PSNR, AutoEnergy",
        "gain, dB",
        "gain image by image, dB",
        "images",
    ]
    lines = []
    for row in rows:
        figures = ["not reached"] * 5
        if not math.isnan(row.eps):
            radius = radius_text("linf" if row.norm == "linf" else "l2", row.eps).partition("-")[2]
            gain = interval((row.gain_db, row.gain_low, row.gain_high))
            figures = [f"{row.recovery_auto:.1f} %", radius, f"{row.psnr_gradmdm:.1f} dB", f"{row.psnr_auto:.1f} dB", gain]
        matched = interval((row.matched_gain_db, row.matched_low, row.matched_high))
        number = f"{row.matched_images}" + (f", {row.unmatched_images} unmatched" if row.unmatched_images else "")
        lines.append([f"`{row.checkpoint}`", row.norm, f"{row.recovery_gradmdm:.1f} %", *figures, matched, number])
    return ["## GradMDM at equal recovery", "", *markdown(head, lines, text=2)]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], *, text: int) -> list[str]:
    """A table whose first ``text`` columns are aligned to the left."""
    return [f"| {' | '.join(head)} |", "|---" * text + "|--:" * (len(head) - text) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def main() -> None:
    """Measure what is missing, then render."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", nargs="+", default=None, help="default: all that ship")
    parser.add_argument("--data", default=None, help="folder with test/<class>/*; without it, checkpoints trained on CIFAR-10 are left out")
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--norms", nargs="+", default=list(NORMS), choices=NORMS)
    parser.add_argument("--gamma", type=float, default=100.0, help="of GradMDM in its own space")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/worst-case"))
    parser.add_argument("--render", action="store_true", help="only write the tables, from the runs that are there")
    options = parser.parse_args()
    quiet()
    # A line for each run is printed here; Lightning's four would drown it.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if not options.render:
        settings = Settings(options.images, options.steps, tuple(options.norms), options.gamma, options.out)
        for checkpoint in options.checkpoints or shipped("checkpoints", ".safetensors"):
            data = data_of(checkpoint, options.data, options.images)
            if data is not None:
                examine(checkpoint, data, settings)
    print(f"wrote {render(options.out)}")


if __name__ == "__main__":
    main()
