"""An engine that holds a tied head apart is sent it, by a run and by an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_gspo.config import load
from megatron_gspo.evaluation.examine import send
from megatron_gspo.sync.head import EMBEDDING, HEAD
from megatron_gspo.types import OPEN
from tests import oracle
from tests.pool import RankPool
from tests.training.conftest import QUICKSTART
from tests.training.stand_in import StandIn
from tests.training.test_faults import endings, settings  # noqa: F401


@pytest.fixture
def tied(quickstart: Path, tmp_path: Path) -> Path:
    """A Qwen3-MoE of the quickstart's vocabulary without a head in its files."""
    model = oracle.make_tiny_qwen3_moe(tmp_path / "tied", layers=2, vocab=16, tie=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_bytes((quickstart / "model" / name).read_bytes())
    assert HEAD not in load_file(model / "model.safetensors")
    return model


def test_a_run_sends_the_embedding_as_the_head_too(ranks: RankPool, settings, tied: Path) -> None:  # noqa: F811
    with StandIn(tied) as server:
        own = [f'model.path="{tied}"', 'sync.method="tensor"', "train.outer_steps=1"]
        assert endings(ranks, settings(server, *own)) == "finished"
    assert set(server.received) == {*load_file(tied / "model.safetensors"), HEAD}
    assert torch.equal(server.received[HEAD], server.received[EMBEDDING])


def test_an_evaluation_sends_it_as_well(overrides: list[str], tied: Path) -> None:
    with StandIn(tied) as server:
        config = load(QUICKSTART / "gspo.toml", [*overrides, f'model.path="{tied}"', 'sync.verify="off"'])
        send(config, tied, [server.url], OPEN)
    stored = load_file(tied / "model.safetensors")
    assert set(server.received) == {*stored, HEAD} and server.version == "0"
    assert torch.equal(server.received[HEAD], stored[EMBEDDING])
