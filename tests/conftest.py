"""Fixtures that several test folders share."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from gatewatt.networks import SkipNet


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests look at what a file holds, never at what the disk still holds after a power cut; waiting for a busy disk takes seconds a file."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def images() -> Tensor:
    """Seven images that look nothing alike, so that an untrained network's gates have something to tell apart."""
    generator = torch.Generator().manual_seed(7)
    contrast = torch.linspace(0.05, 1, 7).view(-1, 1, 1, 1)
    brightness = torch.rand(7, 3, 1, 1, generator=generator)
    return (brightness + contrast * (torch.rand(7, 3, 32, 32, generator=generator) - 0.5)).clamp(0, 1)


@pytest.fixture
def network() -> SkipNet:
    """The smallest network whose gates matter: two gates, four channels, eval mode."""
    torch.manual_seed(1)
    return SkipNet(8, width=4).eval()
