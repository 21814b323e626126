"""Qwen3, dense: grouped-query attention with RMSNorm on each head's query and key, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``Qwen3Config``)."""


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen3 ``config.json``."""
    config = DEFAULTS | config
    config_json.refuse_scaled_rope(config)
    config_json.refuse(config, "attention_bias")
    return config_json.dense_shape(config, megatron={"qk_layernorm": True})


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


FAMILY = Family("Qwen3ForCausalLM", shape, rules, tensor_shapes, DEFAULTS)
