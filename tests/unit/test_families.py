"""Model families: tables that transformers' own files answer to, and what a config.json may not ask."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_gspo.config import ParallelConfig
from megatron_gspo.doctor.tensors import tensors_of
from megatron_gspo.errors import ConfigError, LayoutError
from megatron_gspo.hf.catalog import FAMILIES, read_model
from megatron_gspo.hf.layout import check_layout
from megatron_gspo.hf.parts import join_qkv, split_qkv
from megatron_gspo.parity.models import MODELS, make_model

TINY = ("tiny-moe", "tiny-dense", "tiny-mixtral", "tiny-qwen2-moe", "tiny-olmoe")
TINY += ("tiny-deepseek-v3", "tiny-moonlight", "tiny-glm4-moe", "tiny-qwen2", "tiny-llama")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_model(name, root / name, seed=0) for name in TINY}


def changed(model: Path, tmp_path: Path, **settings: Any) -> Path:
    """A directory with the model's config.json and these settings; null takes one out."""
    config = json.loads((model / "config.json").read_text()) | settings
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return tmp_path


def test_there_is_a_tiny_model_of_every_family(models: dict[str, Path]) -> None:
    assert {read_model(path)[0].architecture for path in models.values()} == set(FAMILIES)
    assert set(TINY) <= set(MODELS)


@pytest.mark.parametrize("name", TINY)
def test_a_familys_table_is_what_transformers_saves_name_by_name_and_shape_by_shape(
    models: dict[str, Path], name: str
) -> None:
    family, shape = read_model(models[name])
    stored = {key: tuple(tensor.shape) for key, tensor in load_file(models[name] / "model.safetensors").items()}
    assert {tensor.name: tensor.shape for tensor in tensors_of(family, shape)} == stored
    assert set(family.tensor_shapes(shape)) == {key for rule in family.rules(shape) for key in rule.hf}


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("tiny-mixtral", {"sliding_window": 4096}, "sliding_window = 4096"),
        ("tiny-mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("tiny-mixtral", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type = "yarn"'),
        ("tiny-mixtral", {"hidden_act": "gelu"}, 'hidden_act = "gelu"'),
        ("tiny-qwen2-moe", {"use_sliding_window": True}, "use_sliding_window = true"),
        ("tiny-qwen2-moe", {"mlp_only_layers": [9]}, "mlp_only_layers = ['9']"),
        ("tiny-qwen2-moe", {"shared_expert_intermediate_size": None}, "lacks 'shared_expert_intermediate_size'"),
        ("tiny-qwen2-moe", {"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size = -1"),
        ("tiny-qwen2-moe", {"qkv_bias": "false"}, "qkv_bias = 'false'"),
        ("tiny-olmoe", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("tiny-olmoe", {"attention_bias": True}, "attention_bias = true"),
        ("tiny-deepseek-v3", {"rope_interleave": False}, "rope_interleave = false"),
        ("tiny-deepseek-v3", {"attention_bias": True}, "attention_bias = true"),
        ("tiny-deepseek-v3", {"topk_group": 3}, "n_group = 4, topk_group = 3, num_experts_per_tok = 4"),
        ("tiny-deepseek-v3", {"norm_topk_prob": False}, "norm_topk_prob = false with num_experts_per_tok = 4"),
        ("tiny-deepseek-v3", {"num_key_value_heads": 4}, "num_key_value_heads = 4"),
        ("tiny-deepseek-v3", {"first_k_dense_replace": -1}, "first_k_dense_replace = -1"),
        ("tiny-deepseek-v3", {"num_nextn_predict_layers": "1"}, "num_nextn_predict_layers = '1'"),
        ("tiny-deepseek-v3", {"kv_lora_rank": None}, "lacks 'kv_lora_rank'"),
        ("tiny-deepseek-v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("tiny-deepseek-v3", {"rope_parameters": {"rope_type": "llama3"}}, 'rope_type = "llama3"'),
        (
            "tiny-deepseek-v3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2}},
            "attention_factor = 1.2",
        ),
        ("tiny-glm4-moe", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 'rope_type = "yarn"'),
        ("tiny-glm4-moe", {"use_qk_norm": "yes"}, "use_qk_norm = 'yes'"),
        ("tiny-llama", {"mlp_bias": True}, "mlp_bias = true"),
        ("tiny-llama", {"attention_bias": True}, "attention_bias = true"),
        ("tiny-llama", {"rope_parameters": {"rope_type": "longrope"}}, 'rope_type = "longrope"'),
        ("tiny-llama", {"rope_parameters": LLAMA | {"factor": 0.5}}, "factor = 0.5"),
        ("tiny-llama", {"rope_parameters": LLAMA | {"factor": None}}, "factor = null"),
        ("tiny-llama", {"rope_parameters": LLAMA | {"low_freq_factor": 4.0}}, "low_freq_factor = 4 "),
        ("tiny-llama", {"rope_parameters": LLAMA | {"original_max_position_embeddings": "8k"}}, '= "8k"'),
        ("tiny-qwen2", {"rope_parameters": YARN | {"attention_factor": 1.0}}, "attention_factor = 1.0"),
        ("tiny-qwen2", {"rope_parameters": YARN | {"beta_fast": 1.0}}, "beta_fast = 1 "),
        ("tiny-qwen2", {"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config"),
        ("tiny-olmoe", {"architectures": ["Olmo3ForCausalLM"]}, "Olmo3ForCausalLM is not supported"),
    ],
)
def test_what_a_family_cannot_do_is_refused_with_the_value(
    models: dict[str, Path], tmp_path: Path, name: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model(changed(models[name], tmp_path, **settings))
    assert words in str(caught.value)


def test_normalised_probabilities_are_a_softmax_over_the_chosen_logits(models: dict[str, Path], tmp_path: Path) -> None:
    for name in ("tiny-olmoe", "tiny-qwen2-moe"):
        for normalised in (True, False):
            _, shape = read_model(changed(models[name], tmp_path, norm_topk_prob=normalised))
            assert shape.megatron["moe_router_pre_softmax"] is not normalised
    assert read_model(models["tiny-mixtral"])[1].megatron["moe_router_pre_softmax"] is False


def test_groups_of_experts_are_left_out_where_every_group_is_chosen(models: dict[str, Path], tmp_path: Path) -> None:
    limited = read_model(models["tiny-deepseek-v3"])[1].megatron
    assert (limited["moe_router_num_groups"], limited["moe_router_group_topk"]) == (4, 2)
    free = read_model(changed(models["tiny-deepseek-v3"], tmp_path, topk_group=4))[1].megatron
    assert (free["moe_router_num_groups"], free["moe_router_group_topk"]) == (None, None)


def test_yarns_two_scales_count_only_together(models: dict[str, Path], tmp_path: Path) -> None:
    """As transformers has it; alone, ``mscale`` is read nowhere."""
    both = read_model(models["tiny-deepseek-v3"])[1].megatron
    assert (both["mscale"], both["mscale_all_dim"]) == (1.0, 0.7)
    rope = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.3}
    alone = read_model(changed(models["tiny-deepseek-v3"], tmp_path, rope_parameters=rope))[1].megatron
    assert (alone["mscale"], alone["mscale_all_dim"]) == (1.0, 0.0)


def test_a_shared_expert_must_divide_over_tensor_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    _, shape = read_model(changed(models["tiny-qwen2-moe"], tmp_path, shared_expert_intermediate_size=41))
    with pytest.raises(LayoutError, match=r"41 rows of the shared expert / parallel.tensor 2 = 20.5"):
        check_layout(ParallelConfig(tensor=2), shape)


@pytest.mark.parametrize("width", [(), (5,)])
def test_query_key_and_value_of_a_group_stand_together_in_matrices_and_biases(width: tuple[int, ...]) -> None:
    dim, groups, heads = 2, 3, 6
    sizes = (heads * dim, groups * dim, groups * dim)
    pieces = [torch.arange(math.prod((size, *width))).view(size, *width) + 1000 * i for i, size in enumerate(sizes)]
    joined = join_qkv(pieces, dim)
    query, key, value = pieces
    expected = []
    for group in range(groups):
        expected += [query[4 * group : 4 * group + 4], key[2 * group : 2 * group + 2], value[2 * group : 2 * group + 2]]
    assert torch.equal(joined, torch.cat(expected))
    for piece, again in zip(pieces, split_qkv(joined, dim, heads // groups), strict=True):
        assert torch.equal(piece, again)
