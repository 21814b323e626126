"""Real servers of further families, which start from whatever is in memory: a push fills every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_gspo.config import RolloutConfig, SyncConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.checkpoint import HfReader
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.rollout.sglang.launcher import LocalServers
from megatron_gspo.sync.base import METHODS, make_weight_sync
from megatron_gspo.sync.head import HEAD, with_head
from megatron_gspo.sync.peers import Peers
from megatron_gspo.train.models import check_engine, engine_holds_head
from tests.rollout.conftest import require_sglang
from tests.rollout.models import FURTHER, save_further_model, tensors_of
from tests.rollout.test_sglang import draw, logprob_error

pytestmark = pytest.mark.rollout


@pytest.mark.parametrize("model_type", FURTHER)
def test_every_method_fills_a_server_that_started_without_weights(model_type: str, tmp_path: Path) -> None:
    require_sglang()
    first, second = (save_further_model(model_type, tmp_path / str(seed), seed) for seed in (0, 1))
    config = RolloutConfig(server_args=("--load-format", "dummy"))
    with LocalServers(config, first, tmp_path / "logs", device="cpu", dtype="float32", key="") as servers:
        (url,) = servers.urls
        for version, method in enumerate(METHODS, start=1):
            model = second if version == 2 else first  # else one that did nothing would pass
            settings = SyncConfig(method=method, verify="every", directory=str(tmp_path))
            sync = make_weight_sync(settings, [url], Peers(), model_path=model)
            sync.push(tensors_of(model), version)
            sync.close()
            assert logprob_error(draw(url, version=version), model) < 1e-5


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA |= {"original_max_position_embeddings": 16}
"""Contexts that are shorter than what is drawn, so that angles are scaled."""
REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen3_moe", {"mlp_only_layers": [0]}),
    ("qwen3_moe", {"decoder_sparse_step": 2}),
    ("qwen3_moe", {"attention_bias": True}),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ("qwen3_moe", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("qwen3", {"attention_bias": True}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    ("qwen2_moe", {"mlp_only_layers": [0]}),
    ("mixtral", {"sliding_window": 4}),
    ("olmoe", {"attention_bias": True}),
    ("olmoe", {"clip_qkv": 0.1}),
    ("olmoe", {"norm_topk_prob": True}),
    ("glm4_moe", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    ("deepseek_v3", {"norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    ("deepseek_v3", {"attention_bias": True}),
    ("deepseek_v3", {"rope_interleave": False}),
)
SERVED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("qwen3_moe", {"tie_word_embeddings": True}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"num_key_value_heads": 4, "rope_theta": 1e6}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("qwen3", {}),
    ("qwen3", {"rope_scaling": YARN}),
    ("qwen3_moe", {"rope_scaling": YARN}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    ("llama", {"rope_scaling": LLAMA}),
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2_moe", {"tie_word_embeddings": True}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("qwen2_moe", {"qkv_bias": False}),
    ("mixtral", {}),
    ("mixtral", {"tie_word_embeddings": True}),
    ("olmoe", {}),
    ("olmoe", {"tie_word_embeddings": True}),
    ("glm4_moe", {"tie_word_embeddings": True}),
    ("glm4_moe", {"use_qk_norm": False, "attention_bias": False}),
    ("glm4_moe", {"n_group": 2, "topk_group": 1}),
    ("glm4_moe", {"first_k_dense_replace": 0}),
    ("glm4_moe", {"n_shared_experts": 2}),
    ("glm4_moe", {"partial_rotary_factor": 1.0}),
)
"""The first is tried every time, `make test-slow` has the others: each starts a server of its own. DeepSeek-V3's latent
attention does not start on a CPU (SGLang 0.5.23)."""


def named(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}-{','.join(case[1])}"


def read(model: Path) -> ModelShape:
    """As a run reads it. Raises ConfigError."""
    _, shape = read_model(model)
    check_engine("sglang", model, shape)
    return shape


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_what_config_json_asks_and_the_engine_or_we_do_not_do_is_refused_by_name(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    model_type, asked = case
    model = save_further_model(model_type, tmp_path, 0, **asked)
    with pytest.raises(ConfigError, match="|".join([*asked, "rope_type"])):
        read(model)


@pytest.mark.parametrize(
    "case", [SERVED[0], *(pytest.param(case, marks=pytest.mark.slow_suite) for case in SERVED[1:])], ids=named
)
def test_what_config_json_asks_else_is_computed_as_transformers_does(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    require_sglang()
    model_type, asked = case
    model = save_further_model(model_type, tmp_path / "model", 0, **asked)
    shape = read(model)
    weights, names = iter(tensors_of(model)), set(HfReader(model).names())
    if engine_holds_head("sglang", shape):
        weights, names = with_head(weights), names | {HEAD}
    config = RolloutConfig(server_args=("--load-format", "dummy"))
    with LocalServers(config, model, tmp_path / "logs", device="cpu", dtype="float32", key="") as servers:
        sync = make_weight_sync(SyncConfig(), servers.urls, Peers(), model_path=model, expected_names=names)
        sync.push(weights, 1)
        error = logprob_error(draw(servers.urls[0], version=1), model)
    print(f"{named(case)}: {error:.1e}")
    assert error < 1e-5
