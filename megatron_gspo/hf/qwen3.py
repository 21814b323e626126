"""Qwen3, dense: grouped-query attention with RMSNorm on each head's query and key, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen3 ``config.json``."""
    parts.refuse_scaled_rope(config)
    parts.refuse(config, "attention_bias")
    return parts.dense_shape(config, megatron={"qk_layernorm": True})


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a Qwen3 model."""
    return (
        *parts.frame_rules(model),
        *parts.norm_rules(),
        *parts.attention_rules(model),
        *parts.dense_mlp_rules(),
    )


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What a Qwen3 checkpoint stores, by the names of ``rules``."""
    return {
        **parts.frame_shapes(model),
        **parts.norm_shapes(model),
        **parts.attention_shapes(model),
        **parts.dense_mlp_shapes(model),
    }


FAMILY = Family("Qwen3ForCausalLM", shape, rules, tensor_shapes)
