"""A trainer without bars and files, and a few real digits, for tests of tasks and callbacks."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the name Lightning's own documentation uses
import pytest
import torch
from torch import Tensor, nn

from gatewatt.data import Batch, DigitsData
from gatewatt.networks import SkipNet
from gatewatt.networks.skipnet import RecurrentGates

QUIET = [
    # The tasks bring batches into the memory format of the weights; gatewatt's data modules have no such hook.
    pytest.mark.filterwarnings("ignore:You have overridden `on_after_batch_transfer` in `LightningModule`"),
    # Runs of a few steps, on purpose.
    pytest.mark.filterwarnings("ignore:`Trainer.fit` stopped"),
]
"""For ``pytestmark``."""


@cache
def _loaded() -> DigitsData:
    data = DigitsData(batch_size=16, eval_batch_size=8, crop_padding=0, val_subset=12, test_images=12)
    data.setup()
    return data


def digits() -> DigitsData:
    """Training batches of 16; 12 images to validate on and 12 to test on, in batches of 8 and 4."""
    # A copy shares the images, which take most of a second to make; nothing changes them.
    return copy.copy(_loaded())


def batches(data: DigitsData, split: str) -> list[Batch]:
    """The batches of ``val`` or ``test`` as they come."""
    return list(data.val_dataloader() if split == "val" else data.test_dataloader())


def trainer(folder: Path, **settings: Any) -> L.Trainer:
    """A trainer on the CPU that writes nothing of its own."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    plain = {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False, "max_epochs": 1}
    return L.Trainer(default_root_dir=folder, **{**quiet, **plain, **settings})


def skipnet(seed: int = 8, **arguments: Any) -> SkipNet:
    """An untrained network in eval mode, with BatchNorm statistics that fit the digits and a first gate that opens for about half of them."""
    torch.manual_seed(seed)
    network = SkipNet(**{"depth": 8, "width": 4, **arguments})
    seen = torch.cat([batch.images for split in ("val", "test") for batch in batches(digits(), split)])
    with torch.no_grad():
        network.train()(seen)
        network.eval()
        gates = network.gating
        if isinstance(gates, RecurrentGates):
            gates.projection.weight *= 20
            gates.projection.bias -= network(seen).gates["block1"].score.logit().median()
        else:
            gates.gates[0].projection.bias[1] -= network(seen).gates["block1"].score.logit().median()
    return network


def statistics(network: nn.Module) -> dict[str, Tensor]:
    """The buffers of every BatchNorm layer."""
    return {name: tensor.clone() for name, tensor in network.named_buffers() if "running" in name or "tracked" in name}
