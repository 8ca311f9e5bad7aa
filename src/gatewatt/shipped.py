"""Where recipes and checkpoints that come with gatewatt lie: in the wheel, or in the folders of a source checkout.

Nothing here imports torch, so that help, reports and completion stay quick.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped_folder(kind: str) -> Path:
    """The folder of shipped ``recipes`` or ``checkpoints``.

    Args:
        kind: ``"recipes"`` or ``"checkpoints"``.

    Returns:
        ``gatewatt/_recipes`` of an installed wheel, else ``recipes`` at the top of the source checkout (which may not exist).
    """
    installed = PACKAGE / f"_{kind}"
    return installed if installed.is_dir() else PACKAGE.parents[1] / kind


def shipped(kind: str, suffix: str) -> list[str]:
    """Names of everything shipped of a kind, without suffix and sorted, as :func:`find_recipe` and :func:`find_checkpoint` accept them."""
    folder = shipped_folder(kind)
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{suffix}"))


def find_recipe(name: str | Path, relative_to: Path | None = None) -> Path:
    """The file that a recipe's name means.

    Args:
        name: a path, or a name such as ``quickstart``, ``quickstart.yaml``, ``recipes/quickstart.yaml`` or ``network/skipnet-38``.
        relative_to: folder that a relative path starts from; the working directory by default. It comes before the shipped recipes.

    Raises:
        FileNotFoundError: naming what was looked for and the nearest names that exist.
    """
    return _find(name, "recipes", ".yaml", relative_to)


def find_checkpoint(name: str | Path) -> Path:
    """The file that a checkpoint's name means: a path, or a shipped name such as ``skipnet-38-cifar10`` (with or without suffix).

    Raises:
        FileNotFoundError: naming what was looked for and the nearest names that exist.
        ValueError: for an address on the net; checkpoints are local files.
    """
    return _find(name, "checkpoints", ".safetensors", None)


def _find(name: str | Path, kind: str, suffix: str, relative_to: Path | None) -> Path:
    text = str(name)
    singular = kind.removesuffix("s")
    if "://" in text:
        raise ValueError(f"{singular} {text!r} is an address on the net; download it, check its sha256 and give the file's path")
    given = Path(text).expanduser()
    # "recipes/quickstart.yaml" means the shipped one wherever there is no such folder to stand in.
    inside = given.relative_to(kind) if given.parts[:1] == (kind,) else given
    places = [(relative_to or Path()) / given]
    if not given.is_absolute():
        places.append(shipped_folder(kind) / inside)
    for place in places:
        for candidate in (place, place.with_name(place.name + suffix) if place.name else place):
            if candidate.is_file():
                return candidate
    existing = shipped(kind, suffix)
    # Imported only for the message: it is not needed on the way to a file that exists.
    from difflib import get_close_matches

    near = get_close_matches(inside.with_suffix("").as_posix() if inside.suffix == suffix else inside.as_posix(), existing, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; shipped: {', '.join(existing)}" if existing else ""
    raise FileNotFoundError(f"no {singular} {text!r}: it is neither a file nor the name of a shipped {singular}{hint}")
