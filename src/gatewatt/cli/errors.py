"""One line per mistake: what the libraries below say, shortened, with the recipe file that set the key."""

from __future__ import annotations

import re
import sys

from gatewatt.recipes import Recipe, RecipeError

LONGEST = 500  # characters of a message; jsonargparse appends whole lists of classes


def explain(error: Exception, recipe: Recipe) -> str | None:
    """One line for an error that the user can mend, or None for one that is a fault of gatewatt.

    Args:
        error: what was raised.
        recipe: the merged recipe, whose origins name files.
    """
    if isinstance(error, RecipeError):
        return one_line(str(error))
    if not isinstance(error, expected()):
        return None
    message = one_line(str(error)) or type(error).__name__
    return message


def expected() -> tuple[type[Exception], ...]:
    """Errors that stem from what the user gave. Libraries that were not imported cannot have raised theirs."""
    kinds: list[type[Exception]] = [ValueError, TypeError, OSError]
    for module, name in (
        ("jsonargparse", "ArgumentError"),
        ("lightning.fabric.utilities.exceptions", "MisconfigurationException"),
        ("gatewatt.flops", "UnpricedOperator"),
    ):
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None:
            kinds.append(kind)
    return tuple(kinds)


def one_line(text: str) -> str:
    """Join lines, and cut what no one reads."""
    joined = re.sub(r"\s+", " ", text).strip()
    return joined if len(joined) <= LONGEST else joined[: LONGEST - 4] + " ..."
