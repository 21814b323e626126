"""DeepSeek-V3 and Moonlight: multi-head latent attention, and experts chosen by biased sigmoids within groups.

The first layers are dense; shared experts are one MLP of their joint width. A multi-token-prediction layer behind the
last is carried, not computed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

SHARED = f"{parts.HF_LAYER}.mlp.shared_experts"
PROJECTIONS = (
    ("linear_q_proj", "q_proj", "rows"),
    ("linear_q_down_proj", "q_a_proj", "whole"),
    ("q_layernorm", "q_a_layernorm", "whole"),
    ("linear_q_up_proj", "q_b_proj", "rows"),
    ("linear_kv_down_proj", "kv_a_proj_with_mqa", "whole"),
    ("kv_layernorm", "kv_a_layernorm", "whole"),
    ("linear_kv_up_proj", "kv_b_proj", "rows"),
    ("linear_proj", "o_proj", "columns"),
)
"""Megatron's name, Hugging Face's, and the cut; the first instead of the next three without ``q_lora_rank``."""
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "q_lora_rank": 1536,
    "first_k_dense_replace": 3,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
    "num_nextn_predict_layers": 1,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``DeepseekV3Config``)."""


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a DeepSeek-V3 ``config.json``."""
    named = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    config = DEFAULTS | config_json.renamed(config, **named)
    config_json.refuse(config, "attention_bias")
    refuse_other_attention(config)
    query = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    return config_json.dense_shape(
        config,
        num_query_groups=config["num_attention_heads"],
        head_dim=query,
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        shared_expert_hidden_size=config["moe_intermediate_size"] * config["n_shared_experts"],
        moe_layers=config_json.layers_after(config),
        carried_layers=config_json.predicting_layers(config),
        megatron={
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "q_lora_rank": config["q_lora_rank"],
            "kv_lora_rank": config["kv_lora_rank"],
            "qk_head_dim": config["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
            "v_head_dim": config["v_head_dim"],
            "rotary_base": config_json.rotary_base(config),
            **rotary(config),
            **config_json.sigmoid_router(config),
        },
    )


def refuse_other_attention(config: dict[str, Any]) -> None:
    """Raises ConfigError for latent attention that Megatron's is not."""
    if config["rope_interleave"] is not True:
        raise ConfigError(
            f"rope_interleave = {json.dumps(config['rope_interleave'])} in config.json is not supported: Megatron "
            f"turns neighbours in pairs"
        )
    heads = config["num_attention_heads"]
    if (config["num_key_value_heads"] or heads) != heads:
        raise ConfigError(
            f"num_key_value_heads = {config['num_key_value_heads']} in config.json is not supported: "
            f"latent attention gives each of the {heads} heads a key and a value"
        )
    if config.get("head_dim") not in (None, config["qk_rope_head_dim"]):
        raise ConfigError(
            f"head_dim = {config['head_dim']} in config.json, which transformers takes for qk_rope_head_dim = "
            f"{config['qk_rope_head_dim']}: remove it"
        )
    if config_json.rope_value(config, "partial_rotary_factor", None) not in (None, 1):
        raise ConfigError("partial_rotary_factor in config.json is not supported: qk_rope_head_dim says it")


def rotary(config: dict[str, Any]) -> dict[str, Any]:
    """Megatron's settings for the rotary angles: the default ones, or YaRN's (arXiv 2309.00071).

    Hugging Face scales cosines and sines by m(mscale) / m(mscale_all_dim) where both are given and by m(1) otherwise,
    m(x) = 0.1 x ln(factor) + 1; and scores by m(mscale_all_dim)^2.
    """
    if config_json.rope_type(config) == "default":
        return {"rope_type": "rope", "rotary_scaling_factor": 1.0}
    rope = config_json.rope(config)
    if config_json.rope_type(config) != "yarn":
        raise ConfigError(
            f'rope_type = "{config_json.rope_type(config)}" in config.json is not supported: "default", "yarn"'
        )
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if rope.get("attention_factor") or rope.get("truncate") is False or (all_dim and not mscale):
        raise ConfigError(
            f"rope_parameters with attention_factor = {rope.get('attention_factor')}, truncate = "
            f"{rope.get('truncate')}, mscale = {mscale}, mscale_all_dim = {all_dim} in config.json are not supported: "
            f"Megatron derives the factor from mscale and mscale_all_dim, and rounds the range"
        )
    return {
        "rope_type": "yarn",
        "rotary_scaling_factor": float(rope["factor"]),
        "original_max_position_embeddings": config_json.original_positions(config),
        "beta_fast": float(rope.get("beta_fast") or 32),
        "beta_slow": float(rope.get("beta_slow") or 1),
        "mscale": float(mscale) if mscale and all_dim else 1.0,
        "mscale_all_dim": float(all_dim) if mscale and all_dim else 0.0,
    }


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a DeepSeek-V3 model."""
    return (
        *parts.frame_rules(model),
        *parts.norm_rules(),
        *(
            parts.plain_rule(f"self_attention.{megatron}.weight", f"self_attn.{hf}.weight", cut)  # type: ignore[arg-type]
            for megatron, hf, cut in PROJECTIONS
            if f"{parts.HF_LAYER}.self_attn.{hf}.weight" in attention_shapes(model)
        ),
        *parts.dense_mlp_rules(),
        *parts.expert_rules(),
        parts.bias_rule(),
        *parts.gated_mlp_rules(parts.SHARED, SHARED),
    )


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What a DeepSeek-V3 checkpoint stores, by the names of ``rules``."""
    return {
        **parts.frame_shapes(model),
        **parts.norm_shapes(model),
        **attention_shapes(model),
        **parts.dense_mlp_shapes(model),
        **parts.expert_shapes(model),
        **parts.bias_shapes(model),
        **parts.gated_mlp_shapes(SHARED, model.hidden_size, model.shared_expert_hidden_size),
    }


def attention_shapes(model: ModelShape) -> parts.Shapes:
    """The tensors of latent attention, with the query through a latent or straight from the hidden states."""
    sizes, hidden, heads = model.megatron, model.hidden_size, model.num_attention_heads
    query, latent, rank = heads * model.head_dim, sizes["kv_lora_rank"], sizes["q_lora_rank"]
    shapes: parts.Shapes = {
        "kv_a_proj_with_mqa": (latent + sizes["qk_pos_emb_head_dim"], hidden),
        "kv_a_layernorm": (latent,),
        "kv_b_proj": (heads * (sizes["qk_head_dim"] + sizes["v_head_dim"]), latent),
        "o_proj": (hidden, heads * sizes["v_head_dim"]),
    }
    if rank is None:
        shapes["q_proj"] = (query, hidden)
    else:
        shapes |= {"q_a_proj": (rank, hidden), "q_a_layernorm": (rank,), "q_b_proj": (query, rank)}
    return {f"{parts.HF_LAYER}.self_attn.{name}.weight": size for name, size in shapes.items()}


FAMILY = Family("DeepseekV3ForCausalLM", shape, rules, tensor_shapes, DEFAULTS)
