"""Qwen3-MoE: Qwen3's attention, and a softmax-routed mixture of experts in place of most MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "norm_topk_prob": False,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``Qwen3MoeConfig``)."""


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen3-MoE ``config.json``."""
    config = DEFAULTS | config_json.renamed(config, num_local_experts="num_experts")
    config_json.refuse(config, "attention_bias")
    return config_json.dense_shape(
        config,
        scaled_rope=config_json.scaled_rope(config),
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        moe_layers=config_json.sparse_layers(config),
        megatron={"qk_layernorm": True, **config_json.softmax_router(bool(config["norm_topk_prob"]))},
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a Qwen3-MoE model."""
    return (*parts.dense_rules(model), *parts.expert_rules())


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What a Qwen3-MoE checkpoint stores, by the names of ``rules``."""
    return {**parts.dense_shapes(model), **parts.expert_shapes(model)}


FAMILY = Family("Qwen3MoeForCausalLM", shape, rules, tensor_shapes, DEFAULTS)
