"""The trained network as a checkpoint file of its own: safetensors and card."""

from __future__ import annotations

import copy
import math
import subprocess
from collections.abc import Iterable
from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import torch

from gatewatt.callbacks.records import versions
from gatewatt.data.batch import Batch
from gatewatt.defenses import bare, described
from gatewatt.flops import measuring
from gatewatt.gating import DynamicNetwork, gate_table, measuring_execution
from gatewatt.networks.checkpoint import save
from gatewatt.tasks.base import NetworkTask

DATASET = "{dataset}"
"""What stands for the name of the data in the name of a file."""


class ExportCheckpoint(L.Callback):
    """Write ``<name>.safetensors`` and its card into the run's folder when training is over.

    The card holds the resolved recipe, data, seed, commit, versions and the last validation's figures; figures on test images are added by
    ``gatewatt test`` (see :class:`~gatewatt.callbacks.ResultFiles`).

    Args:
        name: file name without suffix, ``<network>-<size>-{dataset}[-robust]``; ``{dataset}`` stands for the name of the data that the run is
            given, so that the file of a recipe that is run on other data does not bear the wrong name.
        half: store float16, half the size, if that changes nothing: each of the first ``images`` validation images must keep its prediction and
            the decision of every gate. Otherwise float32 is stored, and the run says why.
        images: how many; at least 1.

    Raises:
        ValueError: if that is no plain file name; at the start of a fit, if the data has no name to stand in it.
    """

    def __init__(self, name: str, *, half: bool = False, images: int = 1000) -> None:
        if not name or "/" in name or name.endswith(".safetensors"):
            raise ValueError(f"name must be a plain file name without suffix, such as skipnet-38-{DATASET}, got {name!r}")
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        self.name, self.half, self.images = name, half, images

    def file_name(self, data: object) -> str:
        """File name without suffix of a network trained on ``data``."""
        if DATASET not in self.name:
            return self.name
        given = getattr(data, "name", None)
        if not given or "/" in given:
            raise ValueError(f"{self.name} names the file after its data, and {type(data).__name__} is named {given!r}; set data.name")
        return self.name.replace(DATASET, given)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what could not be written after hours of training."""
        self.file_name(getattr(trainer, "datamodule", None))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the files, by the first process."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, NetworkTask)
        folder = Path(trainer.default_root_dir)
        recipe = folder / "recipe.yaml"
        data = getattr(trainer, "datamodule", None)
        card = {
            "recipe": recipe.read_text(encoding="utf-8") if recipe.exists() else None,
            "dataset": getattr(data, "name", None),
            "size": getattr(data, "size", None),
            "seed": getattr(data, "seed", None),
            "epochs": trainer.current_epoch,
            "commit": commit(),
            "versions": versions(),
            "license": "MIT",
            "validation": validation_figures(trainer),
            # A file holds the network inside; behind the same defense it is again what was trained.
            "defense": described(pl_module.network),
        }
        name = self.file_name(data)
        half = self.half and self.halves(trainer, pl_module.network)
        save(bare(pl_module.network), folder / f"{name}.safetensors", card=card, half=half)
        print(f"wrote {folder / name}.safetensors{' in float16' if half else ''} and its card")

    def halves(self, trainer: L.Trainer, network: DynamicNetwork) -> bool:
        """Whether ``network`` can be stored in float16; says why not."""
        data = getattr(trainer, "datamodule", None)
        batches: Iterable[Batch] = [] if data is None else data.val_dataloader()
        obstacle = changed_by_half(network, (trainer.strategy.batch_to_device(batch) for batch in batches), self.images)
        if obstacle is not None:
            print(f"stored in float32, not float16: {obstacle}")
        return obstacle is None


def changed_by_half(network: DynamicNetwork, batches: Iterable[Batch], images: int) -> str | None:
    """What storing the weights of ``network`` in float16 would change; None for nothing.

    Args:
        network: left as it is.
        batches: images to compare on.
        images: how many of them.
    """
    rounded, execution = copy.deepcopy(network), measuring_execution(network)
    state = {name: tensor.half().to(tensor) if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()}
    beyond = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if beyond:
        return f"{beyond[0]} holds numbers beyond its range"
    rounded.load_state_dict(state)
    seen = predictions = routes = 0
    with measuring(network), measuring(rounded):
        for batch in batches:
            part = batch.images[: images - seen]
            own, other = network(part, execution), rounded(part, execution)
            predictions += int((own.logits.argmax(1) != other.logits.argmax(1)).sum())
            routes += int((gate_table(own.gates).executed != gate_table(other.gates).executed).any(1).sum())
            seen += len(part)
            if seen == images:
                break
    if not seen:
        return "there are no validation images to compare on"
    return f"of {seen} images {predictions} change their prediction and {routes} a gate" if predictions or routes else None


def validation_figures(trainer: L.Trainer) -> dict[str, float | None]:
    """What the last validation logged; None for what is undefined, such as the recovery of a network whose gates are all open."""
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {name: value if math.isfinite(value) else None for name, value in logged.items()}


def commit() -> str | None:
    """The commit of the source tree this package runs from, or None where it was installed from a wheel."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
