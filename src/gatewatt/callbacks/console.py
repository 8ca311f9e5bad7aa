"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str | None = None) -> None:
    """Print a table; the first column is text, the others are figures.

    Args:
        title: above the table.
        columns: headings.
        rows: cells, as they are to be shown.
        caption: below the table: units and conventions.
    """
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    # A pipe has no width, and rich would cut the figures off at 80 columns.
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)


def percent(fraction: float) -> str:
    """A fraction as a percentage with one digit."""
    return f"{100 * fraction:.1f} %"


def mflops(macs: float) -> str:
    """MACs in millions with two digits."""
    return f"{macs / 1e6:.2f}M"
