"""A tiny random Qwen3-MoE and a real SGLang server that holds it."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.errors import DependencyError
from megatron_gspo.rollout.sglang.launcher import LocalServers, find_server_python
from megatron_gspo.sync.base import make_weight_sync
from megatron_gspo.sync.peers import Peers
from tests.rollout.models import save_tiny_model, tensors_of

torch.set_num_threads(1)


def require_sglang() -> None:
    """Skips without the sglang environment; in CI its absence is a failure."""
    try:
        find_server_python()
    except DependencyError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face directory of the model that servers start from."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"), seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other random weights."""
    return save_tiny_model(tmp_path_factory.mktemp("other-model"), seed=1)


@pytest.fixture(scope="session")
def session_server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    require_sglang()
    config = RolloutConfig(max_prompt_tokens=64, max_response_tokens=64)
    with LocalServers(
        config, tiny_model, tmp_path_factory.mktemp("logs"), device="cpu", dtype="float32", routes=True, key=""
    ) as servers:
        yield servers.urls[0]


@pytest.fixture
def server(session_server: str, tiny_model: Path) -> str:
    """URL of a real server that holds ``tiny_model`` as weight version 0, whatever a test before did to it."""
    if weight_version(session_server) != "0":
        sync = make_weight_sync(SyncConfig(method="tensor"), [session_server], Peers(), model_path=tiny_model)
        sync.push(tensors_of(tiny_model), 0)
    return session_server


def weight_version(url: str) -> str:
    with urllib.request.urlopen(f"{url}/model_info", timeout=30) as response:
        return str(json.load(response)["weight_version"])
