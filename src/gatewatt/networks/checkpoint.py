"""Trained weights as two files: safetensors, and a JSON card that says what they are.

Nothing here unpickles. The card names the network's class, which must be one that :mod:`gatewatt.networks` exports, the arguments that
rebuild it, and the SHA-256 of the weights: safetensors notices a truncated file, but neither it nor ``torch.load`` notices a flipped byte.
The card is the only home of these facts; the safetensors file carries no metadata, so equal weights give equal bytes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as render_safetensors
from torch import Tensor

from gatewatt.files import write_atomically
from gatewatt.gating import DynamicNetwork
from gatewatt.shipped import find_checkpoint

FORMAT = 1
"""Version of the card. A file of a later version is refused rather than half understood."""

SUFFIX = ".safetensors"
RESERVED = ("format", "network", "arguments", "sha256", "dtype")
"""Keys of the card that :func:`save` writes itself."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be read and trusted; the message is one line."""

    def __init__(self, message: str) -> None:
        # Messages quote other libraries, whose own may span lines.
        super().__init__(" ".join(message.split()))


def save(network: DynamicNetwork, path: str | Path, *, card: Mapping[str, Any], half: bool = False, overwrite: bool = False) -> dict[str, Any]:
    """Write the weights of ``network`` and the card beside them.

    Each file appears under its name complete or not at all.

    Args:
        network: an instance of a class that :mod:`gatewatt.networks` exports. Its floating-point weights are stored as float32.
        path: where to write, ``<name>.safetensors``; the card becomes ``<name>.json``. Missing folders are made.
        card: what else is worth knowing (recipe, data, seed, commit, measured figures, license, versions); anything that JSON can hold.
        half: store float16 instead: half the size, and other numbers, so measure after :func:`load`.
        overwrite: replace files that exist.

    Returns:
        The card as written.

    Raises:
        CheckpointError: if the class is not exported, a weight is not finite, the card is not JSON, or a file exists already.
        OSError: if the folder cannot be written.
    """
    target = weights_path(path)
    beside = card_path(target)
    name = type(network).__name__
    if network_classes().get(name) is not type(network):
        raise CheckpointError(f"{name} cannot be saved: of gatewatt.networks, {', '.join(network_classes())} can be rebuilt from a card")
    taken = [key for key in RESERVED if key in card]
    if taken:
        raise CheckpointError(f"card must not hold {', '.join(map(repr, taken))}: save writes {', '.join(RESERVED)} itself")
    weights = render_safetensors(portable(network, half))
    facts = {
        "format": FORMAT,
        "network": name,
        "arguments": network.arguments,
        "dtype": "float16" if half else "float32",
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    rendered = rendered_card({**facts, **card}, target)
    for file in (target, beside):
        if file.exists() and not overwrite:
            raise CheckpointError(f"{file} exists; choose another name or pass overwrite=True")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Weights first: if the second write never happens, what is left is refused for its card, missing or of another file.
    write_atomically(target, weights)
    write_atomically(beside, rendered)
    return json.loads(rendered)


def load(path: str | Path) -> DynamicNetwork:
    """Rebuild a network from its weights and card, on the CPU, in float32 and eval mode.

    The file is hashed against its card and checked to be finite and complete. Nothing is unpickled or executed, and the global random state
    stays as it was.

    Args:
        path: a ``.safetensors`` file with its card beside it, or the name of a checkpoint that ships with gatewatt.

    Raises:
        CheckpointError: in one line, for whatever is wrong with the file, the card, or how they fit the network.
    """
    file = locate(path)
    weights = verified(file)
    network = rebuild(card_of(file), file)
    check_fit(weights, network, file)
    network.load_state_dict(weights)
    return network.eval()


def load_weights(network: DynamicNetwork, path: str | Path) -> None:
    """Give ``network`` the weights of a checkpoint of the same architecture, whatever else its card says.

    A stage of training starts from another this way: SkipNet's sampled decisions from the weights of the straight-through stage.

    Args:
        network: whose weights are replaced, in place; device, dtype and mode stay.
        path: as for :func:`load`.

    Raises:
        CheckpointError: as for :func:`load`, and if it tells another number of classes apart; the network is then as it was.
    """
    file = locate(path)
    weights = verified(file)
    stored, own = card_of(file)["arguments"].get("num_classes"), network.arguments.get("num_classes")
    if stored is not None and own is not None and stored != own:
        # Else the shapes of some tensors would be all that is said.
        raise CheckpointError(
            f"checkpoint {path} tells {stored} classes apart and the network {own}, so its classifier does not fit: "
            f"for data of {stored} classes set num_classes to {stored}, for other data leave the checkpoint out"
        )
    check_fit(weights, network, file)
    network.load_state_dict(weights)


def card_of(path: str | Path) -> dict[str, Any]:
    """Read and check the card of a checkpoint; the weights are not opened.

    Args:
        path: as for :func:`load`.

    Returns:
        The card: ``format``, ``network``, ``arguments``, ``dtype``, ``sha256``, and what the author of the checkpoint added.

    Raises:
        CheckpointError: if the card is missing, unreadable, of a later format, or lacks a fact.
    """
    file = locate(path)
    beside = card_path(file)
    if not beside.exists():
        raise CheckpointError(f"{file} has no card: {beside.name} must lie beside it (copy both files, or write both with checkpoint.save)")
    try:
        card = json.loads(read(beside), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"card {beside} is not valid JSON: {error}") from error
    if not isinstance(card, dict) or not isinstance(card.get("format"), int):
        raise CheckpointError(f"{beside} is not a gatewatt card: it must be a JSON object with an integer 'format'")
    if card["format"] != FORMAT:
        raise CheckpointError(f"card {beside} has format {card['format']}, this gatewatt reads {FORMAT}; upgrade gatewatt")
    for key, kind in {"network": str, "arguments": dict, "sha256": str}.items():
        if not isinstance(card.get(key), kind):
            raise CheckpointError(f"card {beside} must hold {key!r} as {'an object' if kind is dict else 'a string'}, got {card.get(key)!r}")
    return card


def amend_card(path: str | Path, **facts: Any) -> dict[str, Any]:
    """Add facts to the card of a checkpoint, such as figures measured later; the weights are verified against it first.

    Args:
        path: as for :func:`load`.
        **facts: what to write; a fact of that name is replaced.

    Returns:
        The card as written.

    Raises:
        CheckpointError: if the checkpoint is not sound, a fact is not JSON, or it is one that :func:`save` writes itself.
    """
    file = locate(path)
    verified(file)
    taken = [key for key in RESERVED if key in facts]
    if taken:
        raise CheckpointError(f"a card's {', '.join(map(repr, taken))} belong to the weights and cannot be amended")
    rendered = rendered_card({**card_of(file), **facts}, file)
    write_atomically(card_path(file), rendered)
    return json.loads(rendered)


def weights_path(path: str | Path) -> Path:
    """``path`` as a :class:`~pathlib.Path`, refused unless it names a local safetensors file."""
    refuse_url(path)
    file = Path(path)
    if file.suffix != SUFFIX:
        raise CheckpointError(f"a checkpoint is named <name>{SUFFIX}, got {str(path)!r}")
    return file


def card_path(weights: Path) -> Path:
    """Where the card of a weights file lies.

    Example:
        >>> card_path(Path("skipnet-38-cifar10.safetensors")).name
        'skipnet-38-cifar10.json'
    """
    return weights.with_suffix(".json")


def rendered_card(card: Mapping[str, Any], weights: Path) -> bytes:
    """A card as the bytes of its file: sorted, so that equal cards are equal bytes."""
    try:
        return (json.dumps(card, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the card of {weights.name} must hold JSON values and finite numbers only: {error}") from error


def network_classes() -> dict[str, type[DynamicNetwork]]:
    """The dynamic networks that :mod:`gatewatt.networks` exports, by name: the only classes a card can ask for."""
    # Imported here because gatewatt.networks imports this module.
    exports = vars(importlib.import_module("gatewatt.networks"))
    classes = {name: exports[name] for name in exports["__all__"]}
    return {name: kind for name, kind in classes.items() if isinstance(kind, type) and issubclass(kind, DynamicNetwork)}


def locate(path: str | Path) -> Path:
    """The weights file that ``path`` names: a file, or a checkpoint that ships with gatewatt."""
    refuse_url(path)
    try:
        return find_checkpoint(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error


def verified(file: Path) -> dict[str, Tensor]:
    """The tensors of a weights file that is what its card says."""
    content = read(file)
    refuse_pickle(file, content)
    card = card_of(file)
    found = hashlib.sha256(content).hexdigest()
    if found != card["sha256"]:
        raise CheckpointError(f"{file} is damaged or is not the file of its card: SHA-256 is {found}, {card_path(file).name} says {card['sha256']}")
    try:
        return parse_safetensors(content)
    # A header can be valid safetensors and yet name a type that torch has no tensor for, hence KeyError and the like.
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not a complete safetensors file: {error}") from error


def refuse_url(path: str | Path) -> None:
    """Weights are read from this machine only. A :class:`~pathlib.Path` has lost one of the two slashes of a URL."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise CheckpointError(f"{str(path)!r} is a URL: gatewatt opens no remote weights; fetch the {SUFFIX} file and its card, then name the file")


def refuse_constant(name: str) -> None:
    """JSON has no NaN or infinity, though Python's parser reads them."""
    raise ValueError(f"{name} is not a JSON number")


def read(file: Path) -> bytes:
    """The whole file at once: what is hashed is what is parsed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    if not content:
        raise CheckpointError(f"{file} is empty")
    return content


def refuse_pickle(file: Path, content: bytes) -> None:
    """Name the usual mistake, a ``torch.save`` or Lightning file where weights are expected, before anything else is said about it."""
    # torch.save writes a zip archive; before torch 1.6, and pickle itself, a stream that opens with the protocol opcode.
    # A safetensors file opens with the length of its header, which may begin with the same bytes; its header then opens with a brace.
    if content.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")) and content[8:9] != b"{":
        raise CheckpointError(f"{file} is a pickled or zipped file (torch.save, Lightning .ckpt), which can run code; only {SUFFIX} files are loaded")


def rebuild(card: Mapping[str, Any], file: Path) -> DynamicNetwork:
    """Build the network that a card describes, with the random weights of its constructor."""
    classes = network_classes()
    if card["network"] not in classes:
        raise CheckpointError(f"card of {file} asks for network {card['network']!r}; it must be one of {', '.join(classes)}")
    try:
        # The random initialisation is about to be replaced; its draws must not be felt by the caller.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            return classes[card["network"]](**card["arguments"]).float()
    # The arguments come from a file, so whatever the constructor raises is the file's fault.
    except Exception as error:
        raise CheckpointError(f"card of {file} has arguments that {card['network']} refuses: {type(error).__name__}: {error}") from error


def check_fit(stored: Mapping[str, Tensor], network: DynamicNetwork, file: Path) -> None:
    """Raise unless the stored tensors are finite and are exactly those of the network."""
    expected = network.state_dict()
    for complaint, names in {"lacks": expected.keys() - stored.keys(), "holds unexpected": stored.keys() - expected.keys()}.items():
        if names:
            raise CheckpointError(f"{file} does not fit {type(network).__name__}: it {complaint} {enumerated(names)}")
    misshapen = [
        f"{name} ({described(stored[name])} instead of {described(tensor)})"
        for name, tensor in expected.items()
        if stored[name].shape != tensor.shape or stored[name].is_floating_point() != tensor.is_floating_point()
    ]
    if misshapen:
        raise CheckpointError(f"{file} does not fit {type(network).__name__}: {enumerated(misshapen)}")
    refuse_non_finite(stored, str(file))


def refuse_non_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise if a tensor holds NaN or infinity: such a network closes every gate and looks superbly efficient."""
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CheckpointError(f"{where} holds NaN or infinity in {enumerated(broken)}")


def portable(network: DynamicNetwork, half: bool) -> dict[str, Tensor]:
    """The network's persistent state as contiguous CPU tensors of its own memory, floats as float32 or float16."""
    state = {}
    for name, tensor in network.state_dict().items():
        if tensor.dtype == torch.float64:
            raise CheckpointError(f"{name} is float64 and would be rounded; call network.float() first")
        kind = (torch.float16 if half else torch.float32) if tensor.is_floating_point() else tensor.dtype
        # A clone each: safetensors refuses tensors that share memory.
        state[name] = tensor.detach().to("cpu", kind).clone(memory_format=torch.contiguous_format)
    refuse_non_finite(state, f"{type(network).__name__} in {'float16' if half else 'float32'}")
    return state


def described(tensor: Tensor) -> str:
    """Shape and type of a tensor, for a message."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def enumerated(names: Iterable[str], limit: int = 4) -> str:
    """The first names in order, and how many more there are.

    Example:
        >>> enumerated("fbdaec")
        'a, b, c, d and 2 more'
    """
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(ordered[:limit]) + more
