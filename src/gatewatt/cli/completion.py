"""Scripts for shells: verbs, shipped recipes and checkpoints, and the flags one reaches for. Small enough to be read.

Everything is written into the script when it is printed, so that a press of TAB starts no Python.
"""

from __future__ import annotations

from collections.abc import Mapping

from gatewatt.shipped import shipped

SHELLS = ("bash", "zsh", "fish")

_RUN = (
    "--run",
    "--print_config",
    "--help-all",
    "--seed_everything",
    "--ckpt_path",
    "--data.root",
    "--data.batch_size",
    "--data.eval_batch_size",
    "--model.checkpoint",
    "--trainer.accelerator",
    "--trainer.devices",
    "--trainer.precision",
)
_EVALUATE = (*_RUN, "--data.test_images", "--model.attack.gamma", "--model.attack.steps")
FLAGS: Mapping[str, tuple[str, ...]] = {
    "fit": (*_RUN, "--resume", "--trainer.max_epochs", "--trainer.max_steps", "--model.optimization.lr"),
    "validate": _RUN,
    "test": _EVALUATE,
    "predict": _EVALUATE,
    "price": ("--checkpoint", "--size"),
    "audit": ("--checkpoint", "--images", "--patterns", "--size", "--seed"),
    "doctor": ("--checkpoint", "--source", "--images", "--steps", "--norm", "--eps", "--batch", "--seed", "--device", "--run", "--data.root"),
    "report": ("-o", "--title", "--formats", "--no-figures", "--images", "--steps", "--seed", "--results", "--no-run", "--dry-run", "--data.root"),
}
"""Verb -> flags offered; ``-c`` and ``--help`` come on top. The full list of fields is --help-all's."""

VALUES: Mapping[str, str] = {
    "--resume": "auto",
    "--trainer.accelerator": "auto cpu gpu",
    "--trainer.precision": "32-true bf16-mixed 16-mixed",
    "--norm": "linf l2",
    "--device": "cpu cuda",
    "--formats": "png svg png,svg",
}

_BASH = """\
# gatewatt: eval "$(gatewatt completion SHELL)"
_gatewatt() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} words='' files=''
    if [ "$COMP_CWORD" -eq 1 ]; then
        words='VERBS --help --version'
    else
        case $previous in
            -c|--config) words='RECIPES'; files=1 ;;
            --checkpoint|--source|--model.checkpoint) words='CHECKPOINTS'; files=1 ;;
            --data.root|--ckpt_path|-o) files=1 ;;
VALUES\
            *) case ${COMP_WORDS[1]} in
FLAGS\
                completion) words='SHELLS' ;;
            esac ;;
        esac
        case "${COMP_WORDS[1]}$current" in report-*) ;; report*) words='TABLES'; files=1 ;; esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    if [ -n "$files" ]; then COMPREPLY+=($(compgen -f -- "$current")); fi
}
complete -o filenames -F _gatewatt gatewatt
"""


def script(shell: str, verbs: Mapping[str, str]) -> str:
    """The completion script of a shell.

    Args:
        shell: one of :data:`SHELLS`.
        verbs: verb -> its help in one line.
    """
    return fish(verbs) if shell == "fish" else bash(shell, verbs)


def bash(shell: str, verbs: Mapping[str, str]) -> str:
    """For bash; zsh runs the same through its own emulation."""
    flags = "".join(f"                {verb}) words='-c {' '.join(offered)} --help' ;;\n" for verb, offered in FLAGS.items())
    values = "".join(f"            {flag}) words='{words}' ;;\n" for flag, words in VALUES.items())
    text = _BASH.replace("VALUES", values).replace("FLAGS", flags).replace("SHELLS", " ".join(SHELLS)).replace("SHELL", shell)
    text = text.replace("RECIPES", " ".join(runnable())).replace("TABLES", " ".join(tables()))
    text = text.replace("CHECKPOINTS", " ".join(shipped("checkpoints", ".safetensors")))
    text = text.replace("VERBS", " ".join(verbs))
    return text if shell == "bash" else f"autoload -U +X compinit && compinit -u\nautoload -U +X bashcompinit && bashcompinit\n{text}"


def fish(verbs: Mapping[str, str]) -> str:
    """For fish."""
    lines = ["# gatewatt completion fish | source", "complete -c gatewatt -f"]
    lines += [f"complete -c gatewatt -n __fish_use_subcommand -a {verb} -d {quoted(line)}" for verb, line in verbs.items()]
    # Written once, since every verb takes them.
    lines += [f"set -l recipes {' '.join(runnable())}", f"set -l checkpoints {' '.join(shipped('checkpoints', '.safetensors'))}"]
    for verb, flags in FLAGS.items():
        seen = f"complete -c gatewatt -n '__fish_seen_subcommand_from {verb}'"
        if verb == "report":
            lines.append(f"{seen} -F -a {quoted(' '.join(tables()))} -d table")
        else:
            lines.append(f'{seen} -s c -l config -r -F -a "$recipes" -d recipe')
        for flag in flags:
            name = f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
            if flag in ("--checkpoint", "--source", "--model.checkpoint"):
                lines.append(f'{seen} {name} -r -F -a "$checkpoints"')
            elif flag in VALUES:
                lines.append(f"{seen} {name} -x -a {quoted(VALUES[flag])}")
            else:
                lines.append(f"{seen} {name}" + ("" if flag in ("--print_config", "--help-all", "--no-figures", "--no-run", "--dry-run") else " -r"))
    lines.append(f"complete -c gatewatt -n '__fish_seen_subcommand_from completion' -a {quoted(' '.join(SHELLS))}")
    return "\n".join(lines) + "\n"


def runnable() -> list[str]:
    """Names of the shipped recipes that a run can be made of."""
    return [name for name in shipped("recipes", ".yaml") if not name.startswith("tables/")]


def tables() -> list[str]:
    """Names of the shipped recipes of tables and figures."""
    return [name for name in shipped("recipes", ".yaml") if name.startswith("tables/")]


def quoted(text: str) -> str:
    """Text between single quotes, for a shell."""
    return "'" + text.replace("'", r"\'") + "'"
