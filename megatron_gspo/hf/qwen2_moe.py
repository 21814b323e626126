"""Qwen2-MoE: biases on query, key and value, and beside the experts a shared one behind a sigmoid gate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

SHARED, GATE = "mlp.shared_expert", "mlp.shared_expert_gate.weight"
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "norm_topk_prob": False,
    "qkv_bias": True,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``Qwen2MoeConfig``)."""


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen2-MoE ``config.json``."""
    config = DEFAULTS | config_json.renamed(config, num_local_experts="num_experts")
    return config_json.dense_shape(
        config,
        scaled_rope=config_json.scaled_rope(config),
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        shared_expert_hidden_size=config["shared_expert_intermediate_size"],
        moe_layers=config_json.sparse_layers(config),
        megatron={
            "add_qkv_bias": bool(config["qkv_bias"]),
            "moe_shared_expert_gate": True,
            **config_json.softmax_router(bool(config["norm_topk_prob"])),
        },
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a Qwen2-MoE model."""
    return (
        *parts.frame_rules(model),
        *parts.norm_rules(),
        *parts.attention_rules(model),
        *parts.dense_mlp_rules(),
        *parts.expert_rules(),
        *parts.gated_mlp_rules(parts.SHARED, f"{parts.HF_LAYER}.{SHARED}"),
        parts.plain_rule("mlp.shared_experts.gate_weight", GATE),
    )


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What a Qwen2-MoE checkpoint stores, by the names of ``rules``."""
    hidden, layer = model.hidden_size, parts.HF_LAYER
    return {
        **parts.frame_shapes(model),
        **parts.norm_shapes(model),
        **parts.attention_shapes(model),
        **parts.dense_mlp_shapes(model),
        **parts.expert_shapes(model),
        **parts.gated_mlp_shapes(f"{layer}.{SHARED}", hidden, model.shared_expert_hidden_size),
        f"{layer}.{GATE}": (1, hidden),
    }


FAMILY = Family("Qwen2MoeForCausalLM", shape, rules, tensor_shapes, DEFAULTS)
