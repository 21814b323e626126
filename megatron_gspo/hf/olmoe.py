"""OLMoE: RMSNorm over the whole query and the whole key projection, and experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads an OLMoE ``config.json``. ``intermediate_size`` is an expert's."""
    parts.refuse_scaled_rope(config)
    parts.refuse(config, "attention_bias")
    return parts.dense_shape(
        config,
        num_experts=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["intermediate_size"],
        moe_layers=(True,) * config["num_hidden_layers"],
        norm_epsilon=config.get("rms_norm_eps", 1e-5),
        norm_over_heads=True,
        megatron={"qk_layernorm": True, **parts.softmax_router(bool(config.get("norm_topk_prob", False)))},
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of an OLMoE model."""
    return (
        *parts.frame_rules(model),
        *parts.norm_rules(),
        *parts.attention_rules(model),
        *parts.expert_rules(),
    )


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What an OLMoE checkpoint stores, by the names of ``rules``."""
    return {
        **parts.frame_shapes(model),
        **parts.norm_shapes(model),
        **parts.attention_shapes(model),
        **parts.expert_shapes(model),
    }


FAMILY = Family("OlmoeForCausalLM", shape, rules, tensor_shapes)
