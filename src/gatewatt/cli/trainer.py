"""fit, validate, test and predict: LightningCLI with our recipes, run folders and one-line errors."""

from __future__ import annotations

import importlib
import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch
import yaml
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from gatewatt.callbacks import AtomicCheckpointIO, ExportCheckpoint
from gatewatt.callbacks.saving import MetricsFile, stepped, validation_follows
from gatewatt.cli.quiet import quiet
from gatewatt.cli.resume import LENGTH, RECORD, Resumable, check_fit, last_checkpoint, record, recorded, result_of, resuming_command, say
from gatewatt.files import DISK, WriteFailed, sweep, write_text
from gatewatt.recipes import Recipe, RecipeError

FOLDER_VARIABLE = "GATEWATT_RUN_FOLDER"  # tells the processes that Lightning starts which folder the first one reserved
PARTS = ("attacks", "callbacks", "data", "networks", "objectives", "tasks")  # a class may be named without its module once it is imported
SIGTERM_CODE = 143  # 128 + 15; Lightning itself ends a terminated run with 0


class Complete(Exception):
    """The run that is to be resumed has nothing left to do."""


class CutShort(RuntimeError):
    """The machine, not the recipe, ended a run; the message says what was saved and how to go on."""

    exit_code = 1


class RunFolder(L.Callback):
    """Keeps the resolved recipe in the run's folder and in every checkpoint, and makes every process agree on which folder that is.

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
            write_text(self.folder / "recipe.yaml", self.recipe)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write down which network, settings and number of processes the checkpoint belongs to."""
        checkpoint[RECORD] = record(pl_module, yaml.safe_load(self.recipe), trainer.world_size)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say so if training goes on with another number of processes: they share the rest of the epoch out in another way."""
        before = recorded(checkpoint).get("processes", trainer.world_size)
        if trainer.state.fn == "fit" and trainer.is_global_zero and before != trainer.world_size:
            say(
                f"going on with {trainer.world_size} instead of {before} processes: another batch and learning rate in effect, and in the epoch at "
                "work some images come up twice or not at all"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a run that is longer than the schedule that came with its checkpoint."""
        steps = trainer.estimated_stepping_batches
        for config in trainer.lr_scheduler_configs:
            planned = getattr(config.scheduler, "T_max", None) or getattr(config.scheduler, "total_steps", 0) - 1
            if 0 < planned < steps:
                raise ValueError(
                    f"the learning-rate schedule of the checkpoint ends after {planned} steps, this run has {steps}; "
                    "keep the length, or start a new run from the weights with model.checkpoint"
                )


def process_rank() -> int:
    """Rank of this process as Lightning learned it from the environment, before any process group exists."""
    return int(getattr(rank_zero_only, "rank", 0) or 0)


class Stop(L.Callback):
    """Turns a request to stop (SIGTERM, Ctrl+C) into a checkpoint after the step at work, from which the run can be resumed exactly.

    On several processes they agree after every step, so one that is asked stops them all. A second Ctrl+C stops at once, with what was saved
    before. Where a validation follows the step, a checkpoint is written at once and again after it, which is when the run stops.

    Args:
        folder: the run's folder; the checkpoint is ``interrupted.ckpt`` in it.
        command: verb and arguments of the run.
        automatic: whether the run resumes by itself.
    """

    def __init__(self, folder: Path, command: Sequence[str], *, automatic: bool = False) -> None:
        self.folder, self.command, self.automatic = folder, list(command), automatic
        self.noted = 0

    def _listen(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over SIGTERM from Lightning, and Ctrl+C where it is still Python's: a job in the background ignores it."""
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)

    on_train_start = on_test_start = on_predict_start = _listen

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen in a validation that stands alone, too."""
        if trainer.state.fn == "validate":
            self._listen(trainer, pl_module)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if process_rank() == 0:
                say("stopping after this step; once more stops at once")

    def _agreed(self, trainer: L.Trainer) -> int:
        """The signal that any process received, or 0."""
        # Lightning listens from an earlier moment on.
        own = self.noted or (int(signal.SIGTERM) if trainer.received_sigterm else 0)
        if trainer.world_size == 1:
            return own
        return int(trainer.strategy.reduce(torch.tensor(float(own), device=trainer.strategy.root_device), reduce_op="max"))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save and stop, if asked to, where the optimiser has just stepped."""
        number = self._agreed(trainer)
        if not number or not stepped(trainer, batch_idx):
            return
        if validation_follows(trainer, batch_idx):
            # Only what is lost if there is no time for the validation: a run resumed from here would leave that out.
            self._save(trainer, tell=False)
            self.noted = number
        else:
            self._save(trainer)
            self._leave(number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save and stop, if asked to, after the epoch's validation."""
        number = self._agreed(trainer)
        if number:
            self._save(trainer)
            self._leave(number)

    def _evaluated(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Stop an evaluation, if asked to; there is nothing to save."""
        if self.noted and trainer.state.fn != "fit":
            launcher = trainer.strategy.launcher
            if launcher is not None and hasattr(launcher, "kill"):
                # The other processes would wait for this one.
                launcher.kill(signal.SIGTERM)
            self._leave(self.noted)

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _evaluated  # type: ignore[assignment]

    def _save(self, trainer: L.Trainer, *, tell: bool = True) -> None:
        path = Path(trainer.default_root_dir) / "interrupted.ckpt"
        trainer.save_checkpoint(path)
        if tell and trainer.is_global_zero:
            say(f"saved step {trainer.global_step}; resume with: {resuming_command(self.command, path, automatic=self.automatic)}")

    @staticmethod
    def _leave(number: int) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SIGTERMException

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back; Lightning has done so already where a run ended by itself."""
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == self._note:
                signal.signal(number, default)


def run_path(name: str) -> Path:
    """The folder that a run's name means: ``runs/<name>``, or a path such as ``results/first`` as it is."""
    return Path(name) if len(Path(name).parts) > 1 else Path("runs") / name


def reserve_folder(name: str) -> Path:
    """Make ``runs/<name>``, or ``runs/<name>-2`` and so on: a folder that no other run has.

    Args:
        name: a name, or a path such as ``results/first`` that is used as it is.
    """
    wanted = run_path(name)
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


def recipe_of(folder: Path) -> dict[str, Any] | None:
    """The resolved recipe in a run's folder, or None."""
    try:
        settings = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return settings if isinstance(settings, dict) else None


def field(settings: Any, key: str) -> Any:
    """The value at a dotted key of a document, or None."""
    for name in key.split("."):
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


def identity(settings: dict[str, Any]) -> tuple[Any, Any]:
    """What makes two recipes recipes of one run: its task and its network."""
    return field(settings, "model.class_path"), field(settings, "model.init_args.network")


def clear_leftovers(folder: Path, callbacks: Sequence[L.Callback]) -> None:
    """Remove from the folder of a run that is resumed what its killed predecessor left half done."""
    sweep(folder)
    # It says that the run is complete, which it no longer is.
    (folder / "result.json").unlink(missing_ok=True)
    for callback in callbacks:
        if isinstance(callback, ExportCheckpoint):
            # Written when training was over, just before the kill; the resumed run writes them once more.
            for suffix in (".safetensors", ".json"):
                (folder / f"{callback.name}{suffix}").unlink(missing_ok=True)


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
            clear_leftovers(folder, callbacks)
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
