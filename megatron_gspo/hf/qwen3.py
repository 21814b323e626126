"""Qwen3, dense: grouped-query attention with RMSNorm on each head's query and key, SwiGLU."""

from __future__ import annotations

from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape

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
    config_json.refuse(config, "attention_bias")
    return config_json.dense_shape(config, scaled_rope=config_json.scaled_rope(config), megatron={"qk_layernorm": True})


FAMILY = Family("Qwen3ForCausalLM", shape, parts.dense_rules, parts.dense_shapes, DEFAULTS)
