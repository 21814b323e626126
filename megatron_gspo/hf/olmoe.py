"""OLMoE: RMSNorm over the whole query and the whole key projection, and experts in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_gspo.hf import config_json, parts
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,  # as many as heads
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
}
"""What keys that a ``config.json`` may leave out mean: transformers' own (``OlmoeConfig``)."""


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads an OLMoE ``config.json``. ``intermediate_size`` is an expert's."""
    config = DEFAULTS | config_json.renamed(config, num_local_experts="num_experts")
    config_json.refuse_scaled_rope(config)
    config_json.refuse(config, "attention_bias")
    return config_json.dense_shape(
        config,
        num_experts=config["num_experts"],
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["intermediate_size"],
        moe_layers=(True,) * config["num_hidden_layers"],
        norm_over_heads=True,
        megatron={"qk_layernorm": True, **config_json.softmax_router(bool(config["norm_topk_prob"]))},
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of an OLMoE model."""
    return (
        *parts.frame_rules(model),
        *parts.norm_rules(),
        *parts.attention_rules(model),
        *parts.expert_rules(),
    )


def tensor_shapes(model: ModelShape) -> parts.Shapes:
    """What an OLMoE checkpoint stores, by the names of ``rules``."""
    return {
        **parts.frame_shapes(model),
        **parts.norm_shapes(model),
        **parts.attention_shapes(model),
        **parts.expert_shapes(model),
    }


FAMILY = Family("OlmoeForCausalLM", shape, rules, tensor_shapes, DEFAULTS)
