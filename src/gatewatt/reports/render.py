"""The report: every table and figure of a set of runs, from their result files by one command."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gatewatt.files import write_text
from gatewatt.reports.collect import RANKING, Panel, ReportError, Run, collect, panels
from gatewatt.reports.figures import recovery_figure
from gatewatt.reports.matched import Matched, match
from gatewatt.reports.tables import (
    Figures,
    figures_of,
    matched_csv,
    matched_table,
    networks_table,
    orderings_csv,
    orderings_table,
    orderings_text,
    runs_csv,
    runs_table,
    same_attack_table,
)

DRAWS = 2000
SEED = 0
FORMATS = ("png", "svg")

CONVENTIONS = f"""Units and definitions:

- FLOPs are multiply-accumulates (MACs) per image as the ledger counts what was executed; 1 MAC = 1 FLOP.
- Recovery is the ratio of sums 100 * sum(attacked - clean) / sum(dense - clean) over images. The per-image figure is the mean of each
  image's own ratio; images already at full FLOPs have none, are left out of it, and their number stands in brackets.
- MSE is the mean squared error in squared 8-bit levels (pixels on 0..255), averaged over images. PSNR has MAX = 255; in the tables of
  runs it is the mean over changed images, beside a matched MSE it is the PSNR of that MSE.
- "8-bit" is measured again after rounding the adversarial image to 8 bits. Rounding alone costs an MSE of about 0.083.
- n is the number of attacked images. Intervals are 95 % percentile bootstrap intervals over images ({DRAWS} resamples, seed {SEED}); they do
  not cover other training or attack seeds, and each comparison stands by itself, uncorrected for their number.
- At matched MSE each method's recovery is interpolated, linearly in log MSE, between its runs; nothing is extrapolated. The ranking checked
  is {" > ".join(RANKING)}. One resample of images serves all methods. A comparison holds if the interval of the
  difference lies above 0, is reversed if it lies below, and ties otherwise.
"""


def report(
    paths: Iterable[str | Path], out: str | Path, *, title: str = "Results", figures: bool = True, formats: Sequence[str] = ("png",)
) -> list[Path]:
    """Render every run below ``paths`` into ``out``: ``RESULTS.md``, four CSV files and a figure per panel.

    The same runs give the same bytes of Markdown and CSV. Files of an earlier report are replaced: they are derived, not measured.

    Args:
        paths: folders with runs, at any depth.
        out: folder to write into; it may lie outside the runs and is made if needed.
        title: first line of the report.
        figures: whether to draw; needs matplotlib.
        formats: suffixes of the figures, ``png`` or ``svg``.

    Returns:
        The files written, ``RESULTS.md`` first.

    Raises:
        ReportError: if there is no run, one that cannot be rendered, or an unknown format; nothing is written then.
        RecordError: on rows that cannot be trusted; nothing is written then.
    """
    out = Path(out)
    for suffix in formats:
        if suffix not in FORMATS:
            raise ReportError(f"formats must be among {', '.join(FORMATS)}, got {suffix!r}")
    all_panels = panels(collect(paths))
    found = {run.name: figures_of(run, draws=DRAWS, seed=SEED) for panel in all_panels for run in panel.runs}
    matched = [(panel, match(panel, image=image, draws=DRAWS, seed=SEED)) for panel in all_panels for image in ("float", "8bit")]

    drawn: dict[int, list[Path]] = {}
    if figures:
        for index, (panel, slug) in enumerate(zip(all_panels, _slugs(all_panels), strict=True)):
            drawn[index] = [recovery_figure(panel, found, out / f"recovery-{slug}.{suffix}") for suffix in formats]

    sections = [f"# {title}\n", _facts(all_panels), CONVENTIONS, "## Networks\n", networks_table(all_panels, found).markdown()]
    same = same_attack_table(all_panels, found)
    if same.rows:
        sections += ["### Under the same attack\n", same.markdown()]
    for index, panel in enumerate(all_panels):
        images = [path.name for path in drawn.get(index, [])]
        sections += _panel_section(panel, found, [result for owner, result in matched if owner is panel], images)
    written = [
        write_text(out / "RESULTS.md", "\n".join(sections)),
        write_text(out / "runs.csv", runs_csv(all_panels, found)),
        write_text(out / "matched.csv", matched_csv(matched)),
        write_text(out / "orderings.csv", orderings_csv(matched)),
    ]
    return written + [path for paths_of_panel in drawn.values() for path in paths_of_panel]


def _facts(all_panels: Sequence[Panel]) -> str:
    runs = [run for panel in all_panels for run in panel.runs]
    lines = [
        f"Rendered by `gatewatt report` from {len(runs)} run{'s' if len(runs) > 1 else ''}; every figure comes from their records.",
        "All columns are in `runs.csv`, the comparisons in `matched.csv` and `orderings.csv`.",
        versions_text(runs),
    ]
    return "\n".join(lines) + "\n"


def versions_text(runs: Sequence[Run]) -> str:
    """What the runs were measured with."""
    versions = sorted({", ".join(f"{name} {version}" for name, version in sorted(_mapping(run.summary["versions"]).items())) for run in runs})
    return f"Versions: {'; or '.join(version for version in versions if version) or 'not recorded'}."


def _panel_section(panel: Panel, figures: dict[str, Figures], matched: Sequence[Matched], images: Sequence[str]) -> list[str]:
    first = figures[panel.runs[0].name]
    sections = [
        f"## {panel.title}\n",
        f"Clean: accuracy {first.accuracy_clean_percent:.1f} %, {first.flops_clean_percent:.1f} % of {first.flops_dense / 1e6:.2f} M dense MACs "
        f"(sd over images {first.flops_clean_std_percent:.1f} %), {first.images_at_full_flops} of {first.images} images at full FLOPs.\n",
        attacks_text(panel.runs),
    ]
    # One picture is enough to read; the other formats lie beside it.
    sections += [f"![Recovery against MSE]({name})\n" for name in images[:1]]
    sections += ["### Every run\n", runs_table(panel, figures).markdown()]
    # With a single method there is nothing to match, and nothing missing that a note would have to explain.
    for result in matched if len(panel.methods) > 1 else ():
        sections.append(f"### At matched MSE, {'float images' if result.image == 'float' else '8-bit images'}\n")
        if result.points:
            sections += ["Recovery % with its 95 % interval:\n", matched_table(result).markdown()]
            if result.orderings:
                sections += ["The paper's ordering, with the difference in points:\n", orderings_table(result).markdown()]
            sections.append(orderings_text(result))
        if result.notes:
            sections.append("".join(f"- {note[0].upper()}{note[1:]}.\n" for note in result.notes))
    return sections


def attacks_text(runs: Sequence[Run], file: str = "runs.csv") -> str:
    """What all attacks of some runs share; what they do not share stands in ``file``."""
    shared = set.intersection(*(set(run.attack.settings) for run in runs))
    differing = sorted({key for run in runs for key, value in run.attack.settings if (key, value) not in shared})
    text = f"Attacks: {', '.join(dict.fromkeys(run.attack.name for run in runs))}."
    if shared:
        text += f" Settings of all: {', '.join(f'{key}={value}' for key, value in sorted(shared))}."
    if differing:
        text += f" They differ in {', '.join(differing)}; see `{file}`."
    return text + "\n"


def _slugs(all_panels: Sequence[Panel]) -> list[str]:
    slugs: list[str] = []
    for panel in all_panels:
        parts = [panel.network, panel.dataset] + ([panel.defense] if panel.defense != "none" else [])
        slug = re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-") or "panel"
        unique, count = slug, 2
        while unique in slugs:
            unique, count = f"{slug}-{count}", count + 1
        slugs.append(unique)
    return slugs


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}
