"""Tables as Markdown for people and as CSV for programs, from the rows of the runs.

Every figure is computed again from ``records.csv``; the summaries only name things. Same inputs, same bytes.
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gatewatt.metrics.estimates import bootstrap_interval, recovery_per_image_percent, recovery_percent, route_statistics
from gatewatt.metrics.record import psnr_of_mse
from gatewatt.reports.collect import Panel, Run
from gatewatt.reports.matched import Matched

NEARLY_FULL_PERCENT = 95.0
"""A clean pass above this share of dense leaves almost nothing to recover, and its recovery is a ratio of two small numbers."""

Format = Callable[[Any], str]


@dataclass(frozen=True)
class Table:
    """Named columns of raw values.

    Attributes:
        columns: header as people read it -> how a cell is shown.
        rows: raw values, in the order of ``columns``.
    """

    columns: dict[str, Format]
    rows: tuple[tuple[Any, ...], ...]

    def markdown(self) -> str:
        """A Markdown table; numbers are right-aligned."""
        header = list(self.columns)
        numeric = [bool(self.rows) and all(isinstance(row[index], (int, float, type(None))) for row in self.rows) for index in range(len(header))]
        lines = [header, ["--:" if right else "---" for right in numeric]]
        lines += [[show(value) for show, value in zip(self.columns.values(), row, strict=True)] for row in self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def csv_text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """CSV with ten significant digits; what is undefined stays empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


@dataclass(frozen=True)
class Figures:
    """The figures of one run, computed from its rows.

    FLOPs are means per image in MACs, MSE is in squared 8-bit levels, accuracies are percent. ``psnr_db`` is the mean over changed images,
    ``psnr_db_of_mean_mse`` the PSNR of the mean MSE. Intervals are 95 % bootstrap intervals over images.
    """

    images: int
    accuracy_clean_percent: float
    accuracy_adversarial_percent: float
    accuracy_adversarial_8bit_percent: float
    flops_dense: float
    flops_clean: float
    flops_clean_percent: float
    flops_clean_std_percent: float
    flops_adversarial: float
    flops_adversarial_percent: float
    flops_adversarial_p95: float
    recovery_percent: float
    recovery_low: float
    recovery_high: float
    recovery_per_image_percent: float
    images_at_full_flops: int
    recovery_8bit_percent: float
    recovery_8bit_low: float
    recovery_8bit_high: float
    mse_levels2: float
    psnr_db: float
    psnr_db_of_mean_mse: float
    images_unchanged: int
    linf_levels: float
    mse_levels2_8bit: float
    routes_clean: int | None


def figures_of(run: Run, *, draws: int = 2000, seed: int = 0) -> Figures:
    """Compute the figures of a run from its rows."""
    rows, (dense, clean, adversarial, rounded) = run.rows, run.flops.T
    per_image = recovery_per_image_percent(clean, adversarial, dense)
    interval = bootstrap_interval(clean, adversarial, dense, draws=draws, seed=seed)
    interval_8bit = bootstrap_interval(clean, rounded, dense, draws=draws, seed=seed)
    psnr = [row.psnr_db for row in rows if math.isfinite(row.psnr_db)]
    mse, mse_8bit = run.mse.mean(axis=0).tolist()
    return Figures(
        images=len(rows),
        accuracy_clean_percent=_percent(sum(row.prediction_clean == row.label for row in rows), len(rows)),
        accuracy_adversarial_percent=_percent(sum(row.prediction_adversarial == row.label for row in rows), len(rows)),
        accuracy_adversarial_8bit_percent=_percent(sum(row.prediction_adversarial_8bit == row.label for row in rows), len(rows)),
        flops_dense=float(dense.mean()),
        flops_clean=float(clean.mean()),
        flops_clean_percent=_percent(clean.mean(), dense.mean()),
        flops_clean_std_percent=_percent(clean.std(), dense.mean()),
        flops_adversarial=float(adversarial.mean()),
        flops_adversarial_percent=_percent(adversarial.mean(), dense.mean()),
        flops_adversarial_p95=float(np.percentile(adversarial, 95)),
        recovery_percent=recovery_percent(clean, adversarial, dense),
        recovery_low=interval[0],
        recovery_high=interval[1],
        recovery_per_image_percent=per_image.percent,
        images_at_full_flops=per_image.left_out,
        recovery_8bit_percent=recovery_percent(clean, rounded, dense),
        recovery_8bit_low=interval_8bit[0],
        recovery_8bit_high=interval_8bit[1],
        mse_levels2=mse,
        psnr_db=sum(psnr) / len(psnr) if psnr else math.nan,
        psnr_db_of_mean_mse=psnr_of_mse(mse),
        images_unchanged=len(rows) - len(psnr),
        linf_levels=float(sum(row.linf_levels for row in rows) / len(rows)),
        mse_levels2_8bit=mse_8bit,
        routes_clean=route_statistics([[int(unit) for unit in row.gates_clean] for row in rows]).routes if rows[0].gates_clean else None,
    )


def strength_text(run: Run) -> str:
    """The swept setting of a run, such as ``gamma 100``; a dash if it has none."""
    return ", ".join(f"{name} {value:g}" for name, value in run.attack.strength) or "-"


def runs_table(panel: Panel, figures: dict[str, Figures]) -> Table:
    """Every run of a panel: recovery against the size of the change, float and 8-bit."""
    columns: dict[str, Format] = {
        "method": str,
        "strength": str,
        "n": str,
        "recovery %": one_decimal,
        "95 % interval": str,
        "per image % (left out)": str,
        "MSE": three_digits,
        "PSNR dB": one_decimal,
        "8-bit recovery %": one_decimal,
        "8-bit MSE": three_digits,
        "accuracy clean %": one_decimal,
        "accuracy attacked %": one_decimal,
        "8-bit accuracy %": one_decimal,
    }
    rows = []
    for run in panel.runs:
        found = figures[run.name]
        rows.append(
            (
                panel.labels[run.name],
                strength_text(run),
                found.images,
                found.recovery_percent,
                interval_text(found.recovery_low, found.recovery_high),
                f"{one_decimal(found.recovery_per_image_percent)} ({found.images_at_full_flops})",
                found.mse_levels2,
                found.psnr_db,
                found.recovery_8bit_percent,
                found.mse_levels2_8bit,
                found.accuracy_clean_percent,
                found.accuracy_adversarial_percent,
                found.accuracy_adversarial_8bit_percent,
            )
        )
    return Table(columns, tuple(rows))


def runs_csv(all_panels: Sequence[Panel], figures: dict[str, Figures]) -> str:
    """Every run of every panel with all its figures, one line each."""
    names = list(Figures.__dataclass_fields__)
    header = ["run", "network", "dataset", "defense", "seed", "method", "gamma", "eps", "settings", *names]
    rows: list[list[Any]] = []
    for panel in all_panels:
        for run in panel.runs:
            strength = dict(run.attack.strength)
            settings = "; ".join(f"{key}={value}" for key, value in run.attack.settings)
            place = [run.name, panel.network, panel.dataset, panel.defense, panel.seed, panel.labels[run.name]]
            found = [getattr(figures[run.name], name) for name in names]
            rows.append([*place, strength.get("gamma"), strength.get("eps"), settings, *found])
    return csv_text(header, rows)


def matched_table(matched: Matched) -> Table:
    """Recovery of each method with its interval, one line per common MSE."""
    methods = list(dict.fromkeys(point.method for point in matched.points))
    columns: dict[str, Format] = {"MSE": three_digits, "PSNR dB": one_decimal, **dict.fromkeys(methods, str)}
    cells = {(point.method, point.mse_levels2): point for point in matched.points}
    rows = []
    for value in matched.mse_levels2:
        found = [cells[method, value] for method in methods]
        rows.append(
            (value, psnr_of_mse(value), *(f"{one_decimal(point.recovery_percent)} {interval_text(point.low, point.high)}" for point in found))
        )
    return Table(columns, tuple(rows))


def orderings_table(matched: Matched) -> Table:
    """The paper's comparisons, one line per pair and one column per common MSE; neighbours in the ranking come first."""
    columns: dict[str, Format] = {"the paper says": str, **{f"MSE {three_digits(value)}": str for value in matched.mse_levels2}}
    pairs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for found in sorted(matched.orderings, key=lambda found: not found.adjacent):
        pairs[found.stronger, found.weaker].append(f"{found.verdict} ({found.difference:+.1f})")
    return Table(columns, tuple((f"{stronger} > {weaker}", *verdicts) for (stronger, weaker), verdicts in pairs.items()))


def orderings_text(matched: Matched) -> str:
    """One plain sentence per common MSE on the ranking's neighbours, and one on the whole ranking."""
    lines = []
    complete = []
    ranking = ""
    for value in matched.mse_levels2:
        neighbours = [found for found in matched.orderings if found.mse_levels2 == value and found.adjacent]
        if not neighbours:
            return "Fewer than two of the methods are in the paper's ranking: there is no ordering to check.\n"
        ranking = " > ".join(dict.fromkeys(name for found in neighbours for name in (found.stronger, found.weaker)))
        parts = []
        for verdict, words in (("holds", "holds"), ("ties", "ties"), ("reversed", "is reversed")):
            named = [f"{found.stronger} > {found.weaker}" for found in neighbours if found.verdict == verdict]
            if named:
                parts.append(f"{words}: {', '.join(named)}")
        lines.append(f"- At MSE {three_digits(value)}: {'; '.join(parts)}.")
        if all(found.verdict == "holds" for found in neighbours):
            complete.append(three_digits(value))
    where = f"at MSE {', '.join(complete)}" if complete else "at none of these MSE values"
    lines.append(f"- The whole ranking {ranking} holds {where} ({len(complete)} of {len(matched.mse_levels2)}).")
    return "\n".join(lines) + "\n"


def matched_csv(found: Sequence[tuple[Panel, Matched]]) -> str:
    """Recovery at matched MSE of every panel, long form."""
    header = ["network", "dataset", "defense", "seed", "images", "image", "mse_levels2", "method", "recovery_percent", "low", "high"]
    rows = [
        [*_place(panel), matched.image, point.mse_levels2, point.method, point.recovery_percent, point.low, point.high]
        for panel, matched in found
        for point in matched.points
    ]
    return csv_text(header, rows)


def orderings_csv(found: Sequence[tuple[Panel, Matched]]) -> str:
    """Every comparison of every panel, long form."""
    header = ["network", "dataset", "defense", "seed", "images", "image", "mse_levels2"]
    header += ["stronger", "weaker", "adjacent", "difference_points", "low", "high", "verdict"]
    rows = [[*_place(panel), matched.image, *ordering] for panel, matched in found for ordering in matched.orderings]
    return csv_text(header, rows)


def networks_table(all_panels: Sequence[Panel], figures: dict[str, Figures]) -> Table:
    """One line per network and defense: what it spends and how well it classifies on clean images, and the worst case over its runs."""
    columns: dict[str, Format] = {
        "network": str,
        "dataset": str,
        "defense": str,
        "n": str,
        "seed": str,
        "accuracy clean %": one_decimal,
        "dense MMACs": mega,
        "clean FLOPs %": one_decimal,
        "sd over images": one_decimal,
        "at full": str,
        "routes": lambda routes: "-" if routes is None else str(routes),
        "runs": str,
        "most FLOPs under attack %": one_decimal,
        "by": str,
        "remark": str,
    }
    rows = []
    for panel in all_panels:
        clean = figures[panel.runs[0].name]
        worst = max(panel.runs, key=lambda run: figures[run.name].flops_adversarial)
        remarks = []
        if clean.flops_clean_percent > NEARLY_FULL_PERCENT:
            remarks.append("nearly full on clean images: recovery is a ratio of two small numbers")
        # Where the gate strings are absent, constant FLOPs are the next best sign.
        if clean.images > 1 and (clean.routes_clean == 1 or (clean.routes_clean is None and clean.flops_clean_std_percent == 0)):
            remarks.append("one route for every image: the network is static")
        rows.append(
            (
                panel.network,
                panel.dataset,
                panel.defense,
                panel.images,
                panel.seed,
                clean.accuracy_clean_percent,
                clean.flops_dense,
                clean.flops_clean_percent,
                clean.flops_clean_std_percent,
                clean.images_at_full_flops,
                clean.routes_clean,
                len(panel.runs),
                figures[worst.name].flops_adversarial_percent,
                f"{panel.labels[worst.name]}, {strength_text(worst)}",
                "; ".join(remarks) or "-",
            )
        )
    return Table(columns, tuple(rows))


def same_attack_table(all_panels: Sequence[Panel], figures: dict[str, Figures]) -> Table:
    """Networks and defenses side by side under one and the same attack; attacks that met a single network are not listed."""
    columns: dict[str, Format] = {
        "attack": str,
        "network": str,
        "dataset": str,
        "defense": str,
        "n": str,
        "seed": str,
        "accuracy clean %": one_decimal,
        "clean FLOPs %": one_decimal,
        "attacked FLOPs %": one_decimal,
        "recovery %": one_decimal,
        "95 % interval": str,
        "8-bit recovery %": one_decimal,
        "MSE": three_digits,
        "accuracy attacked %": one_decimal,
    }
    groups: dict[tuple[str, Any], list[tuple[Panel, Run]]] = defaultdict(list)
    for panel in all_panels:
        for run in panel.runs:
            groups[panel.dataset, run.attack].append((panel, run))
    rows = []
    for (_, attack), members in sorted(groups.items()):
        if len({(panel.network, panel.defense) for panel, _ in members}) < 2:
            continue
        for panel, run in members:
            found = figures[run.name]
            settings = ", ".join(f"{key}={value}" for key, value in attack.settings)
            label = ", ".join(part for part in (attack.name, strength_text(run), settings) if part not in {"", "-"})
            rows.append(
                (
                    label,
                    panel.network,
                    panel.dataset,
                    panel.defense,
                    found.images,
                    panel.seed,
                    found.accuracy_clean_percent,
                    found.flops_clean_percent,
                    found.flops_adversarial_percent,
                    found.recovery_percent,
                    interval_text(found.recovery_low, found.recovery_high),
                    found.recovery_8bit_percent,
                    found.mse_levels2,
                    found.accuracy_adversarial_percent,
                )
            )
    return Table(columns, tuple(rows))


def one_decimal(value: float | None) -> str:
    """One decimal; ``undefined`` for NaN and infinity."""
    # + 0.0 turns -0.0 into 0.0
    return f"{round(value, 1) + 0.0:.1f}" if value is not None and math.isfinite(value) else "undefined"


def three_digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.3g}"


def mega(value: float) -> str:
    """Millions with two decimals."""
    return f"{value / 1e6:.2f}"


def interval_text(low: float, high: float) -> str:
    """``[low, high]`` with one decimal."""
    return f"[{one_decimal(low)}, {one_decimal(high)}]" if math.isfinite(low) else "undefined"


def _place(panel: Panel) -> list[Any]:
    return [panel.network, panel.dataset, panel.defense, panel.seed, panel.images]


def _percent(part: Any, whole: Any) -> float:
    return 100 * float(part) / float(whole) if whole else math.nan


def _cell(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else value
    return f"{value:.10g}" if math.isfinite(value) else ""
