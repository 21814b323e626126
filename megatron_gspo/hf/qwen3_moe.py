"""Qwen3-MoE: Qwen3's attention, and a softmax-routed mixture of experts in place of most MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_gspo.hf import parts, qwen3
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen3-MoE ``config.json``."""
    return replace(
        qwen3.shape(config),
        num_experts=config.get("num_experts") or config["num_local_experts"],  # transformers 5 writes the latter
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        moe_layers=parts.sparse_layers(config),
        megatron={"qk_layernorm": True, **parts.softmax_router(bool(config.get("norm_topk_prob", False)))},
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a Qwen3-MoE model."""
    return (*qwen3.rules(model), *parts.expert_rules())


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What a Qwen3-MoE checkpoint stores, by the names of ``rules``."""
    return {**qwen3.tensor_shapes(model), **parts.expert_shapes(model)}


FAMILY = Family("Qwen3MoeForCausalLM", shape, rules, tensor_shapes)
