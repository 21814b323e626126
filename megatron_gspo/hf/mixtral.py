"""Mixtral: grouped-query attention, and in every layer experts under a softmax over the chosen ones' logits.

Its checkpoints call the mixture ``block_sparse_moe`` and an expert's gate, up and down matrices w1, w3 and w2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

ROUTER = "block_sparse_moe.gate.weight"
EXPERT = f"{parts.HF_LAYER}.block_sparse_moe.experts.{{expert}}"
NAMES = ("w1", "w3", "w2")


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Mixtral ``config.json``."""
    parts.refuse_scaled_rope(config)
    parts.refuse(config, "sliding_window", "attention_bias")
    return parts.dense_shape(
        config,
        num_experts=config.get("num_local_experts", 8),
        top_k=config.get("num_experts_per_tok", 2),
        expert_hidden_size=config["intermediate_size"],
        moe_layers=(True,) * config["num_hidden_layers"],
        rotary_base=parts.rotary_base(config, 1e6),
        norm_epsilon=config.get("rms_norm_eps", 1e-5),
        megatron=parts.softmax_router(normalised=True),
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


FAMILY = Family("MixtralForCausalLM", shape, rules, tensor_shapes)
