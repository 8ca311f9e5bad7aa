"""A small table recipe over digits, and a stand-in for the trainer that only writes records."""

from __future__ import annotations

from pathlib import Path

from tests.reports.runs import write_run

from gatewatt.cli import main
from gatewatt.recipes import Recipe

TABLE = """\
title: "Table 0: a small one"
claim: nothing of it.
columns: [recovery_percent, mse_levels2]
plot: recovery-mse
images: 20
steps: 10
common: {checkpoint: dvt-small-digits, recipes: [attack/gradmdm]}
rows:
  - label: swept
    sweep: {model.attack.gamma: [0.1, 1]}
    paper: {recovery_percent: 73.4, dataset: ImageNet}
  - {label: Eq. 5, recipes: [attack/eq5], fields: {model.attack.gamma: 10}}
  - {label: elsewhere, checkpoint: nowhere-at-all}
"""


class Trainer:
    """Takes the place of ``gatewatt.cli.trainer.run``: counts what is run, and writes a run whose recovery follows from its gamma.

    Args:
        fails_at: number of the run, counted from 1, that is interrupted after it has written half of its files.
    """

    def __init__(self, fails_at: int = 0) -> None:
        self.fails_at = fails_at
        self.gammas: list[float] = []

    def __call__(self, verb: str, recipe: Recipe, flags: list[str]) -> int:
        assert verb == "test"
        assert not flags
        attack = recipe.settings["model"]["init_args"]["attack"]
        folder, gamma = Path(recipe.settings["run"]), attack["init_args"]["gamma"]
        assert not folder.exists()
        self.gammas.append(gamma)
        method = attack["init_args"].get("name", "GradMDM")
        write_run(
            folder, method=method, gamma=gamma, images=recipe.settings["data"]["init_args"]["test_images"], seed=recipe.settings["seed_everything"]
        )
        if len(self.gammas) == self.fails_at:
            (folder / "summary.json").unlink()
            raise KeyboardInterrupt
        return 0


def report(*arguments: str) -> int:
    """``gatewatt report`` without figures, which take a second each."""
    return main(["report", *arguments, "--no-figures"])
