"""GLM-4.5-MoE: rotary angles on a part of each head, and DeepSeek-V3's router and shared experts behind dense layers.

A multi-token-prediction layer behind the last is carried, not computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

SHARED = f"{parts.HF_LAYER}.mlp.shared_experts"


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a GLM-4.5-MoE ``config.json``."""
    parts.refuse_scaled_rope(config)
    fraction = parts.rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
    return parts.dense_shape(
        config,
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        shared_expert_hidden_size=config["moe_intermediate_size"] * config.get("n_shared_experts", 1),
        moe_layers=parts.layers_after(config, default=1),
        rotary_fraction=float(fraction),
        norm_epsilon=config.get("rms_norm_eps", 1e-5),
        carried_layers=parts.predicting_layers(config),
        megatron={
            "add_qkv_bias": bool(config.get("attention_bias", False)),
            "qk_layernorm": bool(config.get("use_qk_norm", False)),
            **parts.sigmoid_router(config),
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


FAMILY = Family("Glm4MoeForCausalLM", shape, rules, tensor_shapes)
