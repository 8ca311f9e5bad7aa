"""A recipe that trains the smallest network on digits for one step, and variations of it."""

from __future__ import annotations

BASE = """\
model:
  class_path: gatewatt.tasks.DynamicTraining
  init_args:
    network:
      class_path: gatewatt.networks.SkipNet
      init_args:
        depth: 8
        num_classes: 10
        width: 4
    objective:
      class_path: gatewatt.objectives.ComputeTarget
      init_args:
        target: 0.7
    optimization:
      class_path: gatewatt.tasks.Optimization
      init_args:
        lr: 1e-2
data:
  class_path: gatewatt.data.DigitsData
  init_args:
    batch_size: 16
    val_images: 20
trainer:
  max_steps: 1
  log_every_n_steps: 1
  accelerator: cpu
  enable_progress_bar: false
  num_sanity_val_steps: 0
"""


def with_line(old: str, new: str) -> tuple[str, int]:
    """:data:`BASE` with one line's text replaced, and the number of that line."""
    assert BASE.count(old) == 1, old
    return BASE.replace(old, new), BASE[: BASE.index(old)].count("\n") + 1
