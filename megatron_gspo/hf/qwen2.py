"""Qwen2 and Qwen2.5, dense: grouped-query attention with biases on query, key and value, SwiGLU."""

from __future__ import annotations

from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``Qwen2Config``)."""


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen2 ``config.json``."""
    config = DEFAULTS | config
    config_json.refuse(config, "dual_chunk_attention_config")
    return config_json.dense_shape(config, scaled_rope=config_json.scaled_rope(config), megatron={"add_qkv_bias": True})


FAMILY = Family("Qwen2ForCausalLM", shape, parts.dense_rules, parts.dense_shapes, DEFAULTS)
