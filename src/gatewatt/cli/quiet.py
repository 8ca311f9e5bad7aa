"""Keep from the terminal what is no news: advertising, and warnings that a user can do nothing about."""

from __future__ import annotations

import logging
import os
import warnings

LINES = (
    "Tip:",  # advertises litlogger and litmodels at every start
    "Seed set to",  # written to recipe.yaml
    "TPU available",  # always false where torch_xla is missing
)
WARNINGS = (
    # Lightning 2.6 asks torch whether a tree node is a leaf in the old way.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    # fvcore decorates helpers with torch.jit when it is imported, and traces with it.
    r"`torch\.jit\.\w+` is (deprecated|not supported)",
    # The tasks bring batches into the memory format of the weights; the data modules have no such hook.
    r"You have overridden `on_after_batch_transfer` in `LightningModule`",
    # The images of small data sets are in memory: one process loads a batch in a millisecond.
    r"The '\w+' does not have many workers",
    # The folder is the run's own; what lies in it is the recipe that was just written.
    r"(Experiment logs|Checkpoint) directory .* exists and is not empty",
    # Pillow's warning of a bomb; the file is refused by name.
    r"Image size \(\d+ pixels\) exceeds limit",
    # A network that trains its exits alone keeps its trunk in eval mode, on purpose.
    r"Found \d+ module\(s\) in eval mode at the start of training",
    # A resumed run writes to a folder of its own, on purpose.
    r"The dirpath has changed from",
)


class Noise(logging.Filter):
    """Drops the records that hold one of :data:`LINES`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to keep a record."""
        return not any(phrase in record.getMessage() for phrase in LINES)


def quiet() -> None:
    """Filter this process's warnings and Lightning's log; calling it again changes nothing."""
    # Lightning 2.6 calls jsonargparse by names that it renamed; this is jsonargparse's own switch for such warnings.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for pattern in WARNINGS:
        warnings.filterwarnings("ignore", message=pattern)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        # On the handlers: a filter of a logger does not see what its children log.
        for handler in logging.getLogger(name).handlers:
            if not any(isinstance(present, Noise) for present in handler.filters):
                handler.addFilter(Noise())
