"""The command ``gatewatt``: one small dispatcher, quick to start.

Help, the version, reports and every mistake in a recipe are answered before torch is imported; that import alone takes seconds. Whatever is
wrong with what the user gave comes out as one line on stderr and exit code 2; ``GATEWATT_TRACEBACK=1`` shows the traceback instead.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from gatewatt.cli.quiet import quiet
from gatewatt.recipes import VERBS, Recipe, load_recipes

PROGRAM = "gatewatt"
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class UsageError(ValueError):
    """The command line itself is wrong."""


class Help(NamedTuple):
    """Short help of a verb."""

    line: str
    usage: str
    text: str


_RECIPES = """\
  -c FILE            recipe: a path or a shipped name; several merge left to right
  --KEY VALUE        change one field of the recipe, such as --trainer.max_epochs 3 or --data.root cifar10
  --run NAME         name of the run folder, runs/NAME (default: the recipe's name); never overwrites: NAME-2, NAME-3, ...
  --print_config     print the merged and checked recipe, and stop
  --help-all         every field of the recipe
"""

HELP = {
    "fit": Help(
        "train or defend a network",
        "fit -c RECIPE [--KEY VALUE ...]",
        _RECIPES
        + "  --resume auto      keep to runs/NAME and go on from its last checkpoint: the same command starts and resumes\n"
        + "  --ckpt_path FILE   resume from a checkpoint, in a run folder of its own\n"
        + "  Ctrl+C or SIGTERM: saves, prints the command that resumes, exit code 130 or 143.\n",
    ),
    "validate": Help("validate a network on clean images", "validate -c RECIPE [--KEY VALUE ...]", _RECIPES),
    "test": Help("test or attack a network and write summary.json", "test -c RECIPE [--KEY VALUE ...]", _RECIPES),
    "predict": Help("attack images and write them as PNG files", "predict -c RECIPE [--KEY VALUE ...]", _RECIPES),
    "price": Help(
        "print what each gate's decision costs",
        "price (-c RECIPE | --checkpoint NAME) [--size 32]",
        "  -c FILE            recipe with a network, such as network/skipnet-38\n"
        "  --checkpoint NAME  shipped name or .safetensors file, measured behind the defense that it was trained behind\n"
        "  --bare true        leave out the defense that the checkpoint was trained behind\n"
        "  --size N           side of the images in pixels\n",
    ),
    "audit": Help(
        "prove the FLOPs: four independent counts must agree",
        "audit (-c RECIPE | --checkpoint NAME) [--images N] [--patterns N] [--size N]",
        "  -c FILE            recipe with a network; with data too, its test images are used instead of random ones\n"
        "  --checkpoint NAME  shipped name or .safetensors file, measured behind the defense that it was trained behind\n"
        "  --bare true        leave out the defense that the checkpoint was trained behind\n"
        "  --images N         images whose own gates decide (default 100)\n"
        "  --patterns N       random gate patterns that are forced (default 100)\n"
        "  --size N           side of the random images in pixels\n"
        "  --seed N           seed of images and patterns\n"
        "  Exit code 1 if any count differs.\n",
    ),
    "doctor": Help(
        "ask whether a network hides its gradient: is its robustness to be believed?",
        "doctor (--checkpoint NAME | -c RECIPE) [--images N] [--steps N] [--norm linf|l2] [--eps R] [--source NAME]",
        "  --checkpoint NAME  shipped name or .safetensors file, measured behind the defense that it was trained behind; its own data set is\n"
        "                     used where no recipe names another\n"
        "  --bare true        leave out the defense that the checkpoint was trained behind\n"
        "  -c FILE            recipe with a network or data, such as data/folder\n"
        "  --data.root DIR    where the data set lies\n"
        "  --images N         test images (default 100), a seeded choice\n"
        "  --steps N          of the attack with gradients (default 50); the longest has five times as many\n"
        "  --norm, --eps R    of the ball: linf or l2, and its radius in pixel values of 0 to 1 (default 8/255 or 1)\n"
        "  --source NAME      checkpoint of a second network: adds the transfer attack\n"
        "  --batch N          images side by side (default 50); --seed N: of noise and search; --device NAME: cpu or cuda\n"
        "  --run NAME         folder runs/NAME for diagnosis.json (default: doctor-CHECKPOINT)\n"
        "  Exit code 1 if a check fails.\n",
    ),
    "report": Help(
        "render tables and figures from run folders, or measure and render the paper's",
        "report (FOLDER ... | TABLE.yaml ...) [-o report] [--data.root FOLDER] [--KEY VALUE ...]",
        "  FOLDER             run folders, or folders that hold some at any depth\n"
        "  TABLE.yaml         table recipe, such as tables/table04: runs what has no records yet, then renders\n"
        "                     a folder of them, such as recipes/tables: one page from records, nothing is run\n"
        "  -o FOLDER          where the page, CSV files and figures are written (default: report)\n"
        "  --title TEXT       first line of the page\n"
        "  --formats LIST     of the figures: png, svg or png,svg; --no-figures: tables only\n"
        " Of table recipes:\n"
        "  --data.root FOLDER CIFAR-10; NAME=FOLDER for another data set, such as imagenet=FOLDER\n"
        "  --images N         test images of every run; --steps N: of the attacks; --seed N\n"
        "  --KEY VALUE        a field of every run, such as --trainer.precision bf16-mixed\n"
        "  --results FOLDER   where runs are kept and looked up by their key (default: results); --no-run: render only\n"
        "  --dry-run          list what would be run, what has records and what is left out; runs and writes nothing\n",
    ),
    "completion": Help(
        "print a script that completes commands in a shell",
        "completion bash|zsh|fish",
        '  In ~/.bashrc or ~/.zshrc:          eval "$(gatewatt completion bash)" (or zsh)\n'
        "  In ~/.config/fish/config.fish:     gatewatt completion fish | source\n",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the command line without the program's name; that of the process by default.

    Returns:
        Exit code: 0, 1 (an audit or a check of the doctor's failed, or the disk took no more), 2 (one line on stderr says what is wrong),
        130 or 143 (interrupted or terminated).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--"]:
        # `torchrun -m gatewatt -- fit ...`: without it torchrun takes --run for one of its own options.
        del arguments[0]
    if os.environ.get("GATEWATT_TRACEBACK") == "1":
        return dispatch(arguments)
    recipe = Recipe()
    try:
        return dispatch(arguments, recipe)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:
        # Lightning turns an interrupt into exit(1).
        if isinstance(stop.__context__, KeyboardInterrupt):
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
            return INTERRUPTED
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 2
    except BrokenPipeError:
        # The reader, `head` perhaps, has seen enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Imported late: most runs make no mistake.
        from gatewatt.cli.errors import alike, explain

        line = explain(error, recipe)
        if line is None:
            raise
        rank = process_rank()
        if rank == 0:
            print(f"{PROGRAM}: error: {line}", file=sys.stderr)
        elif not alike(error) and alone_in_trouble():
            print(f"{PROGRAM}: error in process {rank}: {line}", file=sys.stderr)
        return getattr(error, "exit_code", 2)


def alone_in_trouble(seconds: float = 3.0) -> bool:
    """Whether the process that started this one is still there after a while: then the first process has not met the same error.

    What all processes meet alike, such as a mistake in the recipe, is said once; torchrun and Lightning end the others when the first has ended.
    """
    parent, deadline = os.getppid(), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.getppid() != parent:
            return False
        time.sleep(0.05)
    return True


def process_rank() -> int:
    """Which of several processes this is, by what those that start processes leave in the environment; 0 where it is alone."""
    for variable in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        if os.environ.get(variable, "").isdecimal():
            return int(os.environ[variable])
    return 0


def dispatch(arguments: list[str], recipe: Recipe | None = None) -> int:
    """Find the verb and run it; ``recipe`` receives what was read, so that a later error can name its file."""
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(overview())
        return 0
    if verb in ("-V", "--version"):
        print(f"{PROGRAM} {installed_version()}")
        return 0
    if verb not in HELP:
        raise UsageError(f"no verb {verb!r}; it must be one of {', '.join(HELP)}")
    if "-h" in rest or "--help" in rest:
        print(f"usage: {PROGRAM} {HELP[verb].usage}\n\n{HELP[verb].line}\n\n{HELP[verb].text}", end="")
        return 0
    if verb == "report":
        from gatewatt.cli.report import render

        return render(rest)
    if verb == "completion":
        return complete(rest)
    names, rest = split_recipes(joined_negatives(rest))
    recipe = Recipe() if recipe is None else recipe
    recipe.flags, recipe.command = rest, list(arguments)
    loaded = load_recipes(names)
    recipe.settings, recipe.origins, recipe.files = loaded.settings, loaded.origins, loaded.files
    # Before the imports, some of which warn.
    quiet()
    if verb in VERBS:
        from gatewatt.cli.trainer import run
    elif verb == "doctor":
        from gatewatt.cli.doctor import run
    else:
        from gatewatt.cli.meter import run
    return run(verb, recipe, rest)


def joined_negatives(arguments: Sequence[str]) -> list[str]:
    """Join a flag and a negative number that follows it, which argparse takes for a flag where it has an exponent.

    Example:
        >>> joined_negatives(["--model.lr", "-1e-2", "--run", "-x"])
        ['--model.lr=-1e-2', '--run', '-x']
    """
    joined: list[str] = []
    for argument in arguments:
        flag = joined[-1] if joined else ""
        if flag.startswith("--") and "=" not in flag and re.fullmatch(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", argument):
            joined[-1] = f"{flag}={argument}"
        else:
            joined.append(argument)
    return joined


def split_recipes(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take every ``-c FILE`` and ``--config FILE`` out of a command line.

    Returns:
        The recipes named, and the rest.

    Example:
        >>> split_recipes(["-c", "a.yaml", "--run", "b", "--config=c.yaml"])
        (['a.yaml', 'c.yaml'], ['--run', 'b'])
    """
    names, rest = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if argument in ("-c", "--config"):
            name = next(remaining, "")
            if not name or name.startswith("-"):
                raise UsageError(f"{argument} needs the name of a recipe")
            names.append(name)
        elif argument.startswith("--config="):
            names.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return names, rest


def complete(arguments: Sequence[str]) -> int:
    """Run ``completion``."""
    from gatewatt.cli.completion import SHELLS, script

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise UsageError(f"completion needs one of {', '.join(SHELLS)}, such as: gatewatt completion bash")
    print(script(arguments[0], {verb: entry.line for verb, entry in HELP.items()}), end="")
    return 0


def installed_version() -> str:
    """The version of the package, also where it runs from a source tree that was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gatewatt")
    except PackageNotFoundError:
        return "(source tree, not installed)"


def overview() -> str:
    """The short help of the whole command."""
    purpose = "Train, attack and defend networks that decide per image what to compute, and count what really ran."
    lines = [f"usage: {PROGRAM} VERB ...", "", purpose, ""]
    lines += [f"  {verb:<12}{entry.line}" for verb, entry in HELP.items()]
    lines += ["", f"  {PROGRAM} VERB --help    a verb's options", f"  {PROGRAM} --version", "", f"First steps: {PROGRAM} fit -c quickstart"]
    return "\n".join(lines)
