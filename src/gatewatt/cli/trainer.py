"""fit, validate, test and predict: LightningCLI with our recipes, run folders and one-line errors."""

from __future__ import annotations

import importlib
import json
import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gatewatt.callbacks import AtomicCheckpointIO
from gatewatt.callbacks.saving import MetricsFile
from gatewatt.cli.folder import FOLDER_VARIABLE, RunFolder, clear_leftovers, field, identity, process_rank, recipe_of, reserve_folder, run_path
from gatewatt.cli.quiet import quiet
from gatewatt.cli.resume import LENGTH, Resumable, check_fit, last_checkpoint, result_of, resuming_command, say
from gatewatt.cli.stop import Stop
from gatewatt.defenses import Wrapper
from gatewatt.files import DISK, WriteFailed, write_text
from gatewatt.networks.checkpoint import card_of
from gatewatt.recipes import Recipe, RecipeError

PARTS = ("attacks", "callbacks", "data", "networks", "objectives", "tasks")  # a class may be named without its module once it is imported
SIGTERM_CODE = 143  # 128 + 15; Lightning itself ends a terminated run with 0


class Complete(Exception):
    """The run that is to be resumed has nothing left to do."""


class CutShort(RuntimeError):
    """The machine, not the recipe, ended a run; the message says what was saved and how to go on."""

    exit_code = 1


def with_atomic_checkpoints(plugins: Any) -> list[Any]:
    """A trainer's plugins, and the writer of checkpoints that a kill or a full disk cannot damage.

    Raises:
        ValueError: if they bring a writer of their own.
    """
    given = [] if plugins is None else list(plugins) if isinstance(plugins, (list, tuple)) else [plugins]
    writers = [plugin for plugin in given if isinstance(plugin, CheckpointIO)]
    if any(not isinstance(writer, AtomicCheckpointIO) for writer in writers):
        name = type(writers[0]).__name__
        raise ValueError(f"trainer.plugins: {name} writes checkpoints its own way; gatewatt writes them with AtomicCheckpointIO, leave it out")
    return given if writers else [*given, AtomicCheckpointIO()]


class RecipeCLI(LightningCLI):
    """LightningCLI for one verb and one merged recipe.

    Args:
        verb: ``fit``, ``validate``, ``test`` or ``predict``.
        recipe: the merged recipe.
        flags: the rest of the command line; flags win over the recipe.
    """

    found: Resumable | None
    folder: Path

    def __init__(self, verb: str, recipe: Recipe, flags: Sequence[str]) -> None:
        self.verb, self.recipe = verb, recipe
        self.automatic, self.found = False, None
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
        """Add the run's name and whether to take it up again."""
        parser.add_argument("--run", type=str | None, default=None, help="Name of the run folder, runs/NAME; by default the recipe's name.")
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: keep to the run folder runs/NAME and continue from its last checkpoint, if it holds one.",
        )

    def before_instantiate_classes(self) -> None:
        """Refuse what would fail late or do harm."""
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint is not None and "://" in str(checkpoint):
            raise ValueError(f"ckpt_path: {checkpoint} is an address on the net; download it and give the file's path")
        if checkpoint is not None and checkpoint not in ("last", "best", "hpc") and not Path(checkpoint).is_file():
            raise ValueError(f"ckpt_path: there is no file {checkpoint}")
        if self._get(self.config, "trainer").get("default_root_dir") is not None:
            raise ValueError("trainer.default_root_dir: the run folder is chosen with --run NAME (or run: NAME in a recipe)")
        self.automatic = self.verb == "fit" and self._get(self.config, "resume") == "auto"
        if self.automatic:
            if checkpoint is not None:
                raise ValueError("resume: auto continues from the run's own last checkpoint, ckpt_path names another; give one of the two")
            self.take_up()

    def take_up(self) -> None:
        """Find where the run stopped, and say so.

        Raises:
            Complete: if there is nothing left to do.
            ValueError: if the folder holds another run.
        """
        folder, settings = run_path(self.run_name()), yaml.safe_load(self.resolved())
        first = process_rank() == 0
        earlier = recipe_of(folder)
        # The first process judges the folder, and may be at work in it while the others are still looking.
        if first and earlier is None and folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"resume: {folder} is no run of gatewatt; choose another --run")
        if first and earlier is not None and identity(earlier) != identity(settings):
            raise ValueError(f"resume: {folder} holds a run of another task or network; choose another --run, or leave resume out")
        result = result_of(folder)
        if result is not None and earlier is not None and all(field(earlier, key) == field(settings, key) for key in LENGTH):
            raise Complete(f"{folder} is complete ({result['steps']} steps); nothing is left to do")
        found = last_checkpoint(folder, tell=first)
        if first:
            say(
                f"resuming {folder} after step {found.step}, from {found.path}"
                if found
                else f"{folder} holds no checkpoint to resume from; starting from the beginning"
            )
        if found is not None:
            self.config[self.verb]["ckpt_path"] = str(found.path)
        self.found = found

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Reserve the run's folder and build the trainer on it."""
        check_classes(self.model, self.datamodule)
        if self.verb != "fit" and process_rank() == 0 and (left_out := defense_left_out(self.model)):
            say(left_out)
        resolved = self.resolved()
        checkpoint = self._get(self.config, "ckpt_path")
        if checkpoint is not None and Path(checkpoint).is_file():
            try:
                check_fit(Path(checkpoint), self.model, yaml.safe_load(resolved), training=self.verb == "fit")
            except ValueError as error:
                raise ValueError(f"{'resume' if self.automatic else 'ckpt_path'}: {error}") from error
        config = self._get(self.config_init, "trainer")
        plugins = with_atomic_checkpoints(config.get("plugins"))
        folder = self.folder = self.run_folder()
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if self.automatic and process_rank() == 0:
            clear_leftovers(folder, callbacks, self.datamodule)
        callbacks += [RunFolder(folder, resolved), MetricsFile(), Stop(folder, self.recipe.command, automatic=self.automatic)]
        if config.get("enable_progress_bar") is not False and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks.append(RichProgressBar())
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(folder.resolve() / "checkpoints")
        if self.verb == "fit" and config.get("enable_checkpointing") is not False and not any(isinstance(item, Checkpoint) for item in callbacks):
            callbacks.append(ModelCheckpoint(folder / "checkpoints"))
        settings: dict[str, Any] = {"default_root_dir": str(folder), "callbacks": callbacks, "plugins": plugins}
        if config.get("logger") in (None, True):
            # What an interrupted run logged beyond its last checkpoint is logged again.
            purge: dict[str, Any] = {"purge_step": self.found.step} if self.found else {}
            settings["logger"] = [TensorBoardLogger(folder, name="tensorboard", version="", **purge)]
        try:
            trainer = super().instantiate_trainer(**settings, **kwargs)
        except BaseException:
            # Nothing has run: what the recipe got wrong should not use up the run's name.
            with suppress(OSError):
                folder.rmdir()
            raise
        if self.automatic and process_rank() == 0:
            # Before anything else is in the folder: by its recipe a run that was killed at once is known again.
            write_text(folder / "recipe.yaml", resolved)
        return trainer

    def run_folder(self) -> Path:
        """The run's folder; made by the first process."""
        if process_rank() > 0 and FOLDER_VARIABLE in os.environ:
            # Lightning started this process from the first one, which had reserved the folder.
            return Path(os.environ[FOLDER_VARIABLE])
        name = self.run_name()
        if process_rank() > 0:
            return run_path(name)
        if self.automatic:
            folder = run_path(name)
            folder.mkdir(parents=True, exist_ok=True)
        else:
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
        try:
            super()._run_subcommand(subcommand)
        except OSError as error:
            if not isinstance(error, WriteFailed) and error.errno not in DISK:
                raise
            raise CutShort(self.saved_so_far(error)) from error

    def saved_so_far(self, error: OSError) -> str:
        """One line on a disk that takes no more: what happened, what is safe, and how to go on."""
        what = str(error) if isinstance(error, WriteFailed) else f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}"
        if self.verb != "fit":
            return what
        found = last_checkpoint(self.folder, tell=False)
        if found is None:
            return f"{what}; no checkpoint had been written yet"
        again = resuming_command(self.recipe.command, found.path, automatic=self.automatic)
        return f"{what}; the last good checkpoint is {found.path} (step {found.step}); with room to write, resume with: {again}"

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict" and arguments.get("return_predictions") is None:
            # Callbacks write what is wanted; kept in memory, the images of a whole data set would add up to gigabytes.
            arguments["return_predictions"] = False
        return arguments

    def resolved(self) -> str:
        """The recipe with every default written out, as it runs; usable as a recipe again."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False, skip_validation=True))[self.verb]
        # Whoever runs this file again means the run, not its continuation.
        for name in ("config", "resume", *(["ckpt_path"] if self.automatic else [])):
            settings.pop(name, None)
        settings["run"] = self.run_name()
        header = f"# Written by gatewatt {self.verb}; every field as it ran. Repeat with: gatewatt {self.verb} -c recipe.yaml\n"
        return header + yaml.safe_dump(settings, sort_keys=False)


def check_classes(task: object, data: L.LightningDataModule | None) -> None:
    """Raise unless the network that ``task`` holds has as many classes as the data."""
    network = getattr(task, "network", None)
    classes = getattr(network, "arguments", {}).get("num_classes")
    there = getattr(data, "num_classes", None)
    if classes is not None and there is not None and classes != there:
        name = getattr(data, "name", type(data).__name__)
        raise ValueError(f"num_classes of the network is {classes}, the data {name} has {there} classes; set num_classes to {there}")


def defense_left_out(task: object) -> str | None:
    """One line if the weights of ``task`` were trained behind a defense and are to be measured without any; else None."""
    checkpoint, network = getattr(task, "checkpoint", None), getattr(task, "network", None)
    defense = card_of(checkpoint).get("defense") if checkpoint is not None and not isinstance(network, Wrapper) else None
    if not defense:
        return None
    values = " ".join(f"{key}={value}" for key, value in defense.items() if isinstance(value, (int, float)))
    return (
        f"{checkpoint} was trained behind {' '.join(filter(None, (defense['name'], values)))}, and this run measures it without: add -c defense/..."
    )


def empty_mappings(settings: dict[str, Any], key: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Key paths of all mappings of a recipe that hold nothing."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from empty_mappings(value, (*key, name))
            if not value and name not in ("init_args", "dict_kwargs"):
                yield (*key, name)


def hush_writers(details: threading.ExceptHookArgs) -> None:
    """Keep a background writer's traceback off the terminal where the disk is at fault: the writer raises the same in the main thread."""
    if not (isinstance(details.exc_value, OSError) and details.exc_value.errno in DISK):
        threading.__excepthook__(details)


def run(verb: str, recipe: Recipe, flags: Sequence[str]) -> int:
    """Run a trainer verb; returns the exit code."""
    quiet()
    for part in PARTS:
        importlib.import_module(f"gatewatt.{part}")
    before, threading.excepthook = threading.excepthook, hush_writers
    try:
        RecipeCLI(verb, recipe, ["--help" if flag == "--help-all" else flag for flag in flags])
    except SIGTERMException:
        return SIGTERM_CODE
    except Complete as complete:
        if process_rank() == 0:
            say(str(complete))
    finally:
        threading.excepthook = before
    return 0
