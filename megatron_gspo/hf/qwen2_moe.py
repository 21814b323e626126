"""Qwen2-MoE: biases on query, key and value, and beside the experts a shared one behind a sigmoid gate of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

SHARED, GATE = "mlp.shared_expert", "mlp.shared_expert_gate.weight"


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen2-MoE ``config.json``."""
    parts.refuse_scaled_rope(config)
    return parts.dense_shape(
        config,
        num_experts=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        shared_expert_hidden_size=config["shared_expert_intermediate_size"],
        moe_layers=parts.sparse_layers(config),
        megatron={
            "add_qkv_bias": bool(config.get("qkv_bias", True)),
            "moe_shared_expert_gate": True,
            **parts.softmax_router(bool(config.get("norm_topk_prob", False))),
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


FAMILY = Family("Qwen2MoeForCausalLM", shape, rules, tensor_shapes)
