"""Mixtral: grouped-query attention, and in every layer experts under a softmax over the chosen ones' logits.

Its checkpoints call the mixture ``block_sparse_moe`` and an expert's gate, up and down matrices w1, w3 and w2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

ROUTER = "block_sparse_moe.gate.weight"
EXPERT = f"{parts.HF_LAYER}.block_sparse_moe.experts.{{expert}}"
NAMES = ("w1", "w3", "w2")
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``MixtralConfig``)."""
ROTARY_BASE = 1e6


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Mixtral ``config.json``."""
    config = DEFAULTS | config_json.renamed(config, num_experts="num_local_experts")
    config_json.refuse_scaled_rope(config)
    config_json.refuse(config, "sliding_window", "attention_bias")
    return config_json.dense_shape(
        config,
        num_experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["intermediate_size"],
        moe_layers=(True,) * config["num_hidden_layers"],
        rotary_base=config_json.rotary_base(config, ROTARY_BASE),
        megatron=config_json.softmax_router(normalised=True),
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a Mixtral model."""
    return (
        *parts.frame_rules(model),
        *parts.norm_rules(),
        *parts.attention_rules(model),
        *parts.expert_rules(ROUTER, EXPERT, NAMES),
    )


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What a Mixtral checkpoint stores, by the names of ``rules``."""
    return {
        **parts.frame_shapes(model),
        **parts.norm_shapes(model),
        **parts.attention_shapes(model),
        **parts.expert_shapes(model, ROUTER, EXPERT, NAMES),
    }


FAMILY = Family("MixtralForCausalLM", shape, rules, tensor_shapes, DEFAULTS)
