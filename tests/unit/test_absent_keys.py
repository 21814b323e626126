"""Keys that a config.json leaves out: they mean what they mean to transformers, or are refused by name."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import FAMILIES, read_model
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.train.models import check_engine

Config = dict[str, Any]

FRAME: Config = {
    "num_hidden_layers": 4,
    "vocab_size": 67,
    "hidden_size": 512,
    "intermediate_size": 48,
    "num_attention_heads": 128,
    "num_key_value_heads": 64,
    "max_position_embeddings": 777,
    "rms_norm_eps": 3e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
QWEN: Config = {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True}
QWEN |= {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
SIGMOID: Config = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "n_group": 4,
    "topk_group": 2,
    "num_nextn_predict_layers": 3,
}
LATENT: Config = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
BASES: dict[str, Config] = {
    "Qwen3ForCausalLM": FRAME | {"head_dim": 16},
    "Qwen2ForCausalLM": FRAME,
    "LlamaForCausalLM": FRAME | {"head_dim": 16},
    "Qwen3MoeForCausalLM": FRAME | QWEN | {"head_dim": 16},
    "Qwen2MoeForCausalLM": FRAME | QWEN | {"shared_expert_intermediate_size": 40, "qkv_bias": False, "head_dim": 16},
    "MixtralForCausalLM": FRAME | {"num_local_experts": 9, "num_experts_per_tok": 3, "head_dim": 16},
    "OlmoeForCausalLM": FRAME | {"num_experts": 9, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 16},
    "DeepseekV3ForCausalLM": FRAME | SIGMOID | LATENT | {"num_key_value_heads": 128, "rope_interleave": True},
    "Glm4MoeForCausalLM": FRAME
    | SIGMOID
    | {"partial_rotary_factor": 0.25, "attention_bias": True, "use_qk_norm": True, "head_dim": 16},
}
"""Architecture -> settings that are none of transformers' defaults, as far as the family takes others."""
SAME_AS_DEFAULT = {"hidden_act", "rope_interleave", "num_key_value_heads", "norm_topk_prob"}
"""Keys whose value in a base may be the default: the family takes no other, or another key hides it."""
ALIASES = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts"}
ALIASES |= {"num_local_experts": "num_experts", "num_nextn_predict_layers": "num_mtp_layers"}


def model_type(architecture: str) -> str:
    words = {"Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe", "Qwen2Moe": "qwen2_moe", "Mixtral": "mixtral", "Olmoe": "olmoe"}
    words |= {"DeepseekV3": "deepseek_v3", "Glm4Moe": "glm4_moe", "Qwen2": "qwen2", "Llama": "llama"}
    return words[architecture.removesuffix("ForCausalLM")]


def ours(directory: Path, architecture: str, config: Config) -> ModelShape | str:
    """The shape, or what is said against it."""
    (directory / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    try:
        return read_model(directory)[1]
    except ConfigError as error:
        return str(error)


def theirs(architecture: str, config: Config) -> Any:
    return CONFIG_MAPPING[model_type(architecture)].from_dict(dict(config))


def value_of(config: Any, key: str) -> Any:
    """What transformers makes of a key; rotary settings it moves into a dictionary of its own."""
    if key in ("rope_theta", "partial_rotary_factor"):
        return config.rope_parameters[key]
    return getattr(config, key)


def test_there_is_a_configuration_of_every_family() -> None:
    assert set(BASES) == set(FAMILIES)


@pytest.mark.parametrize("architecture", BASES)
def test_a_familys_defaults_are_those_of_transformers(architecture: str) -> None:
    fields = {f.name: f.default for f in dataclasses.fields(CONFIG_MAPPING[model_type(architecture)])}
    aliases = {new: old for old, new in (("num_mtp_layers", "num_nextn_predict_layers"),)}
    defaults = FAMILIES[architecture].defaults
    assert defaults == {key: fields[aliases.get(key, key)] for key in defaults}


@pytest.mark.parametrize("style", ["old", "new"])
@pytest.mark.parametrize("architecture", BASES)
def test_an_absent_key_is_the_default_of_transformers_or_refused_by_name(
    tmp_path: Path, architecture: str, style: str
) -> None:
    """Every key of the base and every field of transformers' class, one at a time. In the new style, transformers has
    written the file: ``rope_parameters``, and its own name for the number of experts."""
    base = BASES[architecture]
    if style == "new":
        base = json.loads(theirs(architecture, base | {"rope_scaling": None}).to_json_string(use_diff=False))
    whole = ours(tmp_path, architecture, base)
    assert isinstance(whole, ModelShape), whole
    fields = {field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type(architecture)])}
    refused, silent = set[str](), set[str]()
    for key in sorted((fields | set(base)) - {"architectures", "model_type"}):
        absent = {name: value for name, value in base.items() if name not in (key, ALIASES.get(key))}
        found = ours(tmp_path, architecture, absent)
        if isinstance(found, str):
            assert key in found or ALIASES.get(key, key) in found, f"{key}: {found}"
            refused.add(key)
            continue
        meant = value_of(theirs(architecture, absent), key) if key != "head_dim" else None
        written = absent if key == "head_dim" else absent | {key: meant}
        assert found == ours(tmp_path, architecture, written), f"{key}: {meant!r} in transformers"
        silent |= {key} if found == whole and key in BASES[architecture] else set()
    twice = {"partial_rotary_factor"} if style == "new" else set()  # in rope_parameters, too
    assert silent <= SAME_AS_DEFAULT | twice, "removing them changed nothing, so that nothing was tested"
    assert refused <= {
        *("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_experts"),
        *("num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "shared_expert_intermediate_size"),
        *("norm_topk_prob", "topk_group"),
    }


def test_a_head_has_the_size_that_transformers_gives_it(tmp_path: Path) -> None:
    """Only Qwen3 has one of its own, whatever the hidden size is."""
    for architecture, base in BASES.items():
        config = {key: value for key, value in base.items() if key != "head_dim"}
        shape = ours(tmp_path, architecture, config)
        assert isinstance(shape, ModelShape)
        special = {"Qwen3ForCausalLM": 128, "DeepseekV3ForCausalLM": 8 + 4}
        assert shape.head_dim == special.get(architecture, 512 // 128)


def test_a_default_that_is_refused_is_said_to_be_none_of_the_file(tmp_path: Path) -> None:
    base = {key: value for key, value in BASES["Qwen3ForCausalLM"].items() if key != "num_key_value_heads"}
    said = ours(tmp_path, "Qwen3ForCausalLM", base | {"num_attention_heads": 8})
    assert isinstance(said, str)
    assert "8 attention heads for 32 key-value heads (num_key_value_heads): it must divide" in said
    assert said.endswith("(num_key_value_heads = 32: transformers' default, where config.json has none)")


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("Qwen3MoeForCausalLM", {"num_local_experts": 8}, "num_experts = 9 and num_local_experts = 8"),
        ("DeepseekV3ForCausalLM", {"num_mtp_layers": 1}, "num_nextn_predict_layers = 3 and num_mtp_layers = 1"),
        ("Qwen3ForCausalLM", {"rope_parameters": {"rope_theta": 1.0}}, "rope_theta = 5000.0 in config.json, and 1.0"),
        (
            "Qwen3ForCausalLM",
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            'rope_scaling = {"rope_type": "yarn", "factor": 4.0} in config.json differ',
        ),
        ("Qwen3ForCausalLM", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "with 'full_attention'"),
        ("Qwen3ForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "with 'sliding_attention'"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, 'scoring_func = "softmax"'),
        ("DeepseekV3ForCausalLM", {"topk_method": "greedy"}, 'topk_method = "greedy"'),
        ("DeepseekV3ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ("DeepseekV3ForCausalLM", {"head_dim": 12}, "head_dim = 12"),
        ("DeepseekV3ForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Qwen3MoeForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 in config.json is not"),
        ("LlamaForCausalLM", {"rope_scaling": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25 in"),
        ("Qwen3ForCausalLM", {"rope_scaling": ["yarn"]}, 'rotary settings of config.json are ["yarn"], not an object'),
        ("Qwen3ForCausalLM", {"rope_theta": "10000"}, 'rope_theta = "10000" in config.json is not a number'),
    ],
)
def test_what_two_keys_disagree_on_and_what_no_model_here_does_is_refused(
    tmp_path: Path, architecture: str, settings: Config, words: str
) -> None:
    said = ours(tmp_path, architecture, BASES[architecture] | settings)
    assert isinstance(said, str) and words in said


def test_the_same_under_two_names_is_read(tmp_path: Path) -> None:
    base = BASES["DeepseekV3ForCausalLM"]
    both = {"num_local_experts": 16, "num_mtp_layers": 3, "rope_parameters": {"rope_theta": 5000.0}}
    assert ours(tmp_path, "DeepseekV3ForCausalLM", base | both) == ours(tmp_path, "DeepseekV3ForCausalLM", base)
    other = {key: value for key, value in base.items() if key != "n_routed_experts"} | {"num_local_experts": 16}
    assert ours(tmp_path, "DeepseekV3ForCausalLM", other) == ours(tmp_path, "DeepseekV3ForCausalLM", base)


def test_groups_of_experts_that_are_absent_are_those_of_transformers(tmp_path: Path) -> None:
    base = BASES["DeepseekV3ForCausalLM"] | {"num_experts_per_tok": 8}
    shape = ours(
        tmp_path, "DeepseekV3ForCausalLM", {k: v for k, v in base.items() if k not in ("n_group", "topk_group")}
    )
    assert isinstance(shape, ModelShape)
    assert (shape.megatron["moe_router_num_groups"], shape.megatron["moe_router_group_topk"]) == (8, 4)


@pytest.mark.parametrize(("place", "positions"), [("within", 50), ("both", 50), ("absent", 777)])
def test_yarn_begins_from_the_positions_that_transformers_takes(tmp_path: Path, place: str, positions: int) -> None:
    yarn: Config = {"rope_type": "yarn", "factor": 4.0}
    config = BASES["DeepseekV3ForCausalLM"] | {"rope_scaling": yarn}
    if place != "absent":
        yarn["original_max_position_embeddings"] = 50
    if place == "both":
        config["original_max_position_embeddings"] = 50
    shape = ours(tmp_path, "DeepseekV3ForCausalLM", config)
    assert isinstance(shape, ModelShape)
    found = theirs("DeepseekV3ForCausalLM", json.loads(json.dumps(config))).rope_parameters
    assert shape.megatron["original_max_position_embeddings"] == found["original_max_position_embeddings"] == positions
    assert shape.rotary_base == found["rope_theta"] == 5000.0


@pytest.mark.parametrize("architecture", ["Qwen2MoeForCausalLM", "MixtralForCausalLM", "OlmoeForCausalLM"])
def test_heads_that_the_engine_would_give_another_size_are_refused_for_rollouts(
    tmp_path: Path, architecture: str
) -> None:
    sound = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": False}
    config = BASES[architecture] | sound | {"architectures": [architecture]}
    size = config["hidden_size"] // config["num_attention_heads"]
    for head_dim in (size, 2 * size):
        (tmp_path / "config.json").write_text(json.dumps(config | {"head_dim": head_dim}))
        _, shape = read_model(tmp_path)
        refused = pytest.raises(ConfigError, match=rf"head_dim = {2 * size} .* sglang gives a {architecture} heads of")
        with refused if head_dim != size else nullcontext():
            check_engine("sglang", tmp_path, shape)
