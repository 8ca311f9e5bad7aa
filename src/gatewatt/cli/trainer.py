"""fit, validate, test and predict: LightningCLI with our recipes, run folders and one-line errors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import yaml
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from gatewatt.recipes import Recipe

# Names that recipes may give without their module are those of classes already imported.
import gatewatt.data
import gatewatt.networks
import gatewatt.objectives
import gatewatt.tasks  # noqa: F401

FOLDER_VARIABLE = "GATEWATT_RUN_FOLDER"


class RunFolder(L.Callback):
    """Keeps the resolved recipe in the run's folder, and makes every process agree on which folder that is.

    Args:
        folder: the run's folder, reserved by the first process.
        recipe: the resolved recipe, as YAML.
    """

    def __init__(self, folder: Path, recipe: str) -> None:
        self.folder, self.recipe = folder, recipe

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Share the folder and write ``recipe.yaml``."""
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))
        # Under torchrun all processes start at once, so only now can the others learn what the first one reserved.
        trainer._default_root_dir = str(self.folder)
        if trainer.is_global_zero:
            (self.folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")


def reserve_folder(name: str) -> Path:
    """Make ``runs/<name>``, or ``runs/<name>-2`` and so on: a folder that no other run has.

    Args:
        name: a name, or a path such as ``results/first`` that is used as it is.
    """
    wanted = Path(name) if len(Path(name).parts) > 1 else Path("runs") / name
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            # Two runs that start together cannot both make it.
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


class RecipeCLI(LightningCLI):
    """LightningCLI for one verb and one merged recipe.

    Args:
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        recipe: the merged recipe.
        flags: the rest of the command line; flags win over the recipe.
    """

    def __init__(self, verb: str, recipe: Recipe, flags: Sequence[str]) -> None:
        self.verb, self.recipe = verb, recipe
        # One document, in JSON: it reads back the same under every dialect of YAML.
        document = [f"--config={json.dumps(recipe.settings)}"] if recipe.settings else []
        quiet = {"exit_on_error": False, "prog": f"gatewatt {verb}"}
        super().__init__(
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={"use_distributed_sampler": False, "enable_model_summary": False},
            parser_kwargs={"exit_on_error": False, "prog": "gatewatt", verb: quiet},
            args=[verb, *document, *flags],
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the verb that runs: building the parsers of all four takes four times as long."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse what was given to the constructor, whatever is in ``sys.argv``."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: hyper-parameters stored there would beat flags given on the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name."""
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run folder, runs/NAME; by default the recipe's name.")

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail late or do harm."""
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint and "://" in str(checkpoint):
            raise ValueError(f"ckpt_path: {checkpoint} is an address on the net; download it and give the file's path")
        if self._get(self.config, "trainer").get("default_root_dir") is not None:
            raise ValueError("trainer.default_root_dir: the run folder is chosen with --run NAME (or run: NAME in a recipe)")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Reserve the run's folder and build the trainer on it."""
        check_classes(self.model, self.datamodule)
        folder = self.run_folder()
        config = self._get(self.config_init, "trainer")
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        callbacks.append(RunFolder(folder, self.resolved()))
        if config.get("enable_progress_bar") is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(RichProgressBar())
        settings: dict[str, Any] = {"default_root_dir": str(folder), "callbacks": callbacks}
        if config.get("logger") in (None, True):
            settings["logger"] = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="tensorboard", version="")]
        return super().instantiate_trainer(**settings, **kwargs)

    def run_folder(self) -> Path:
        """The run's folder; made by the first process."""
        if rank_zero_only.rank > 0 and FOLDER_VARIABLE in os.environ:
            # Lightning started this process from the first one, which had reserved the folder.
            return Path(os.environ[FOLDER_VARIABLE])
        name = self._get(self.config, "run") or (self.recipe.files[-1].stem if self.recipe.files else self.verb)
        if rank_zero_only.rank > 0:
            return Path("runs") / name
        folder = reserve_folder(name)
        os.environ[FOLDER_VARIABLE] = str(folder)
        return folder

    def resolved(self) -> str:
        """The recipe with every default written out, as it runs; usable as a recipe again."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_validation=True))[self.verb]
        settings.pop("config", None)
        header = f"# Written by gatewatt {self.verb}; every field as it ran. Repeat with: gatewatt {self.verb} -c recipe.yaml\n"
        return header + yaml.safe_dump(settings, sort_keys=False)


def check_classes(task: L.LightningModule, data: L.LightningDataModule | None) -> None:
    """Raise unless the network has as many classes as the data."""
    network = getattr(task, "network", None)
    classes = getattr(network, "arguments", {}).get("num_classes")
    there = getattr(data, "num_classes", None)
    if classes is not None and there is not None and classes != there:
        raise ValueError(f"the network has num_classes {classes}, the data {getattr(data, 'name', '')} {there}; set the network's num_classes to {there}")


def run(verb: str, recipe: Recipe, flags: Sequence[str]) -> int:
    """Run a trainer verb; returns the exit code."""
    flags = ["--help" if flag == "--help-all" else flag for flag in flags]
    RecipeCLI(verb, recipe, flags)
    return 0
