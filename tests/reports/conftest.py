"""Reports are tested on many small runs, which need not survive a power cut."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def without_flushing(monkeypatch):
    """Flushing to disk can take seconds on a busy machine."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
