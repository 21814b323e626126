"""Llama 2 and 3, dense: grouped-query attention, SwiGLU; from 3.1 on rotary frequencies scaled by Llama 3's rule."""

from __future__ import annotations

from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``LlamaConfig``)."""


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Llama ``config.json``."""
    config = DEFAULTS | config
    config_json.refuse(config, "attention_bias", "mlp_bias")
    return config_json.dense_shape(config, scaled_rope=config_json.scaled_rope(config))


FAMILY = Family("LlamaForCausalLM", shape, parts.dense_rules, parts.dense_shapes, DEFAULTS)
