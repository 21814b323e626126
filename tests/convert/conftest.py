"""The ranks that convert, and tiny checkpoints to convert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import oracle
from tests.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> RankPool:
    return RankPool()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary of 67, which two tensor ranks pad; a dense layer and a mixture of experts."""
    directory = tmp_path_factory.mktemp("convert") / "tiny"
    oracle.make_tiny_qwen3_moe(directory, layers=2, mlp_only_layers=[0], dtype=torch.float32)
    (directory / "tokenizer.json").write_text('{"made": "up"}')
    (directory / "notes.txt").write_bytes(b"\x00\xff whatever")
    return directory
