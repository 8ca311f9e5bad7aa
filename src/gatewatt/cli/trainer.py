"""fit, validate, test and predict: LightningCLI with our recipes, run folders and one-line errors."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import yaml
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gatewatt.callbacks import AtomicCheckpointIO
from gatewatt.cli.quiet import quiet
from gatewatt.recipes import Recipe, RecipeError

FOLDER_VARIABLE = "GATEWATT_RUN_FOLDER"  # tells the processes that Lightning starts which folder the first one reserved
PARTS = ("attacks", "callbacks", "data", "networks", "objectives", "tasks")  # a class may be named without its module once it is imported
SIGTERM_CODE = 143  # 128 + 15; Lightning itself ends a terminated run with 0


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
        trainer._default_root_dir = str(self.folder)  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            (self.folder / "recipe.yaml").write_text(self.recipe, encoding="utf-8")


def process_rank() -> int:
    """Rank of this process as Lightning learned it from the environment, before any process group exists."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


class Stop(L.Callback):
    """Turns a request to stop (SIGTERM, Ctrl+C) into a checkpoint after the step at work, from which the run can be resumed exactly.

    A second Ctrl+C stops at once. On several processes requests reach each at another step, so there only the regular checkpoints remain.

    Args:
        folder: the run's folder; the checkpoint is ``interrupted.ckpt`` in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.interrupted = folder, False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over Ctrl+C, where it is still Python's: only the main thread may, and a job in the background ignores it."""
        python_handles = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if trainer.world_size == 1 and python_handles and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("gatewatt: stopping after this step; once more stops at once", file=sys.stderr)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and stop, if asked to, where the optimiser has just stepped."""
        asked = self.interrupted or trainer.received_sigterm
        stepped = trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if asked and stepped and trainer.world_size == 1:
            path = self.folder / "interrupted.ckpt"
            trainer.save_checkpoint(path)
            print(f"gatewatt: resume with the same command and --ckpt_path {path}", file=sys.stderr)
            raise KeyboardInterrupt if self.interrupted else SIGTERMException

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give Ctrl+C back."""
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


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
        """Parse what was given to the constructor, whatever is in ``sys.argv``, and refuse what jsonargparse lets through."""
        self.config = parser.parse_args(args)
        config = self.config[self.verb]
        for key in empty_mappings(self.recipe.settings):
            # An unknown key that holds an empty mapping vanishes without a word.
            if ".".join(key) not in config:
                raise RecipeError(f"{self.recipe.origins[key]}: {'.'.join(key)}: there is no such field")
        for name, value in config.items():
            # Recipes are checked when they are read; this is for flags.
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"--{name}: numbers must be finite, got {value}")

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: hyper-parameters stored there would beat flags given on the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the run's name."""
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run folder, runs/NAME; by default the recipe's name.")

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail late or do harm."""
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint is not None and "://" in str(checkpoint):
            raise ValueError(f"ckpt_path: {checkpoint} is an address on the net; download it and give the file's path")
        if checkpoint is not None and checkpoint not in ("last", "best", "hpc") and not Path(checkpoint).is_file():
            raise ValueError(f"ckpt_path: there is no file {checkpoint}")
        if self._get(self.config, "trainer").get("default_root_dir") is not None:
            raise ValueError("trainer.default_root_dir: the run folder is chosen with --run NAME (or run: NAME in a recipe)")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Reserve the run's folder and build the trainer on it."""
        check_classes(self.model, self.datamodule)
        folder = self.run_folder()
        config = self._get(self.config_init, "trainer")
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        callbacks += [RunFolder(folder, self.resolved()), Stop(folder)]
        if config.get("enable_progress_bar") is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(RichProgressBar())
        settings: dict[str, Any] = {"default_root_dir": str(folder), "callbacks": callbacks}
        if not config.get("plugins"):
            settings["plugins"] = [AtomicCheckpointIO()]
        if config.get("logger") in (None, True):
            settings["logger"] = [CSVLogger(folder, name="", version=""), TensorBoardLogger(folder, name="tensorboard", version="")]
        try:
            return super().instantiate_trainer(**settings, **kwargs)
        except BaseException:
            # Nothing has run: what the recipe got wrong should not use up the run's name.
            with suppress(OSError):
                folder.rmdir()
            raise

    def run_folder(self) -> Path:
        """The run's folder; made by the first process."""
        if process_rank() > 0 and FOLDER_VARIABLE in os.environ:
            # Lightning started this process from the first one, which had reserved the folder.
            return Path(os.environ[FOLDER_VARIABLE])
        name = self.run_name()
        if process_rank() > 0:
            return Path("runs") / name
        folder = reserve_folder(name)
        os.environ[FOLDER_VARIABLE] = str(folder)
        return folder

    def run_name(self) -> str:
        """The name given, else the recipe's; "recipe.yaml" in a run's folder has the folder's."""
        name = self._get(self.config, "run")
        if name is None and self.recipe.files:
            path = self.recipe.files[-1].resolve()
            name = path.parent.name if path.name == "recipe.yaml" else path.stem
        return name or self.verb

    def _run_subcommand(self, subcommand: str) -> None:
        """Run the verb; from here on the recipe is no longer the first suspect of an error."""
        self.recipe.running = True
        super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict" and arguments.get("return_predictions") is None:
            # Callbacks write what is wanted; kept in memory, the images of a whole data set would add up to gigabytes.
            arguments["return_predictions"] = False
        return arguments

    def resolved(self) -> str:
        """The recipe with every default written out, as it runs; usable as a recipe again."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_validation=True))[self.verb]
        settings.pop("config", None)
        settings["run"] = self.run_name()
        header = f"# Written by gatewatt {self.verb}; every field as it ran. Repeat with: gatewatt {self.verb} -c recipe.yaml\n"
        return header + yaml.safe_dump(settings, sort_keys=False)


def check_classes(task: L.LightningModule, data: L.LightningDataModule | None) -> None:
    """Raise unless the network has as many classes as the data."""
    network = getattr(task, "network", None)
    classes = getattr(network, "arguments", {}).get("num_classes")
    there = getattr(data, "num_classes", None)
    if classes is not None and there is not None and classes != there:
        name = getattr(data, "name", type(data).__name__)
        raise ValueError(f"num_classes of the network is {classes}, the data {name} has {there} classes; set num_classes to {there}")


def empty_mappings(settings: dict[str, Any], key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Key paths of all mappings of a recipe that hold nothing."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from empty_mappings(value, (*key, name))
            if not value and name not in ("init_args", "dict_kwargs"):
                yield (*key, name)


def run(verb: str, recipe: Recipe, flags: Sequence[str]) -> int:
    """Run a trainer verb; returns the exit code."""
    quiet()
    for part in PARTS:
        importlib.import_module(f"gatewatt.{part}")
    try:
        RecipeCLI(verb, recipe, ["--help" if flag == "--help-all" else flag for flag in flags])
    except SIGTERMException:
        return SIGTERM_CODE
    return 0
