"""GLM-4.5-MoE: rotary angles on a part of each head, and DeepSeek-V3's router and shared experts behind dense layers.

A multi-token-prediction layer behind the last is carried, not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

SHARED = f"{parts.HF_LAYER}.mlp.shared_experts"
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "attention_bias": False,
    "use_qk_norm": False,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 1,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``Glm4MoeConfig``)."""
ROTARY_FRACTION = 0.5


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a GLM-4.5-MoE ``config.json``."""
    named = {"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"}
    config = DEFAULTS | config_json.renamed(config, **named)
    config_json.refuse_scaled_rope(config)
    return config_json.dense_shape(
        config,
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        shared_expert_hidden_size=config["moe_intermediate_size"] * config["n_shared_experts"],
        moe_layers=config_json.layers_after(config),
        rotary_fraction=float(config_json.rope_value(config, "partial_rotary_factor", ROTARY_FRACTION)),
        carried_layers=config_json.predicting_layers(config),
        megatron={
            "add_qkv_bias": bool(config["attention_bias"]),
            "qk_layernorm": bool(config["use_qk_norm"]),
            **config_json.sigmoid_router(config),
        },
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a GLM-4.5-MoE model."""
    return (
        *parts.frame_rules(model),
        *parts.norm_rules(),
        *parts.attention_rules(model),
        *parts.dense_mlp_rules(),
        *parts.expert_rules(),
        parts.bias_rule(),
        *parts.gated_mlp_rules(parts.SHARED, SHARED),
    )


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What a GLM-4.5-MoE checkpoint stores, by the names of ``rules``."""
    return {
        **parts.frame_shapes(model),
        **parts.norm_shapes(model),
        **parts.attention_shapes(model),
        **parts.dense_mlp_shapes(model),
        **parts.expert_shapes(model),
        **parts.bias_shapes(model),
        **parts.gated_mlp_shapes(SHARED, model.hidden_size, model.shared_expert_hidden_size),
    }


FAMILY = Family("Glm4MoeForCausalLM", shape, rules, tensor_shapes, DEFAULTS)
