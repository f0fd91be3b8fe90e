"""Shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_tools import write_data
from s3_tools import server, url, wire  # noqa: F401 - fixtures of every file that asks for them
from sherl_pipe.pipeline import planning

# The models here are tiny: threads gain nothing, and on a busy machine their barriers cost a lot.
torch.set_num_threads(1)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data of two tasks, in which plans are measured quickly."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "SECONDS", 0.2)
    write_data(tmp_path / "data", ("colour", "size"), train=70, validation=30)
    return tmp_path
