"""Real servers in eight bits: SGLang's own loaders, with products in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.config.servers import ServerSizes
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.rollout.sglang.control import Servers
from megatron_gspo.rollout.sglang.launcher import LocalServers
from megatron_gspo.sync.base import make_weight_sync
from megatron_gspo.sync.peers import Peers
from megatron_gspo.train.engine_dtype import sent, sent_names, served_directory
from megatron_gspo.train.models import check_served
from megatron_gspo.types import Rollout
from tests.rollout.conftest import require_sglang
from tests.rollout.models import save_wide_model, tensors_of, transformers_logprobs
from tests.rollout.test_sglang import draw

pytestmark = [pytest.mark.rollout, pytest.mark.slow_suite]

ROLLOUT = RolloutConfig(engine_dtype="fp8")
PUSHES = (("tensor", 1), ("tensor", 0), ("disk", 1), ("disk", 0), ("distributed", 1), ("distributed", 0))
"""(Method, which model's weights)."""


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "glm4_moe", "qwen3"])
def test_every_method_leaves_what_the_server_loads_by_itself(model_type: str, tmp_path: Path) -> None:
    """From a directory such as ``convert --dtype fp8`` writes, to the last bit of every parameter."""
    require_sglang()
    models = [save_wide_model(model_type, tmp_path / str(seed), seed) for seed in (0, 1)]
    family, shape = read_model(models[0])
    narrow = served_directory(ROLLOUT, models[0], tmp_path, ServerSizes())
    save_file(dict(sent("fp8", tensors_of(models[0]), family, shape)), narrow / "model.safetensors", {"format": "pt"})
    names = sent_names("fp8", {name for name, _ in tensors_of(models[0])}, family, shape)
    with LocalServers(ROLLOUT, narrow, tmp_path / "logs", device="cpu", dtype="fp8", key="") as servers:
        check_served(servers.urls, str(models[0]), dtype="fp8")
        loaded = Servers(servers.urls).checksums()
        for version, (method, which) in enumerate(PUSHES, start=1):
            settings = SyncConfig(method=method, verify="every", directory=str(tmp_path))
            sync = make_weight_sync(settings, servers.urls, Peers(), model_path=models[which], expected_names=names)
            sync.push(sent("fp8", tensors_of(models[which]), family, shape), version)
            sync.close()
            assert (Servers(servers.urls).checksums() == loaded) is (which == 0), method
        groups = draw(servers.urls[0], version=len(PUSHES))
        assert mean_error(groups, models[0]) < mean_error(groups, models[1]) / 2


def mean_error(groups: list[list[Rollout]], model: Path) -> float:
    """Mean distance of the engine's logprobs from transformers' in float32: routers of random weights are near ties,
    and single tokens go to other experts."""
    errors = [
        np.abs(each.rollout_logprobs - transformers_logprobs(model, each.prompt.token_ids, each.response_ids.tolist()))
        for group in groups
        for each in group
    ]
    return float(np.concatenate(errors).mean())
