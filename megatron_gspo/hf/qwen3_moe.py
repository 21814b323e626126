"""Qwen3-MoE: Qwen3's attention, and a softmax-routed mixture of experts in place of most MLPs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf import qwen3
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

ROUTER = f"{qwen3.HF_LAYER}.mlp.gate.weight"


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen3-MoE ``config.json``.

    ``norm_topk_prob`` divides the chosen experts' probabilities by their sum, which is a softmax over the chosen
    logits; without it the probabilities of the softmax over all experts are used as they are (pre-softmax).
    """
    step = config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    layers = range(config["num_hidden_layers"])
    if not all(type(layer) is int and layer in layers for layer in dense):
        raise ConfigError(f"mlp_only_layers = {sorted(map(str, dense))} in config.json are not layers of {len(layers)}")
    return replace(
        qwen3.shape(config),
        num_experts=config.get("num_experts") or config["num_local_experts"],  # transformers 5 writes the latter
        top_k=config["num_experts_per_tok"],
        expert_hidden_size=config["moe_intermediate_size"],
        moe_layers=tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers),
        megatron={
            "qk_layernorm": True,
            "moe_router_pre_softmax": not config.get("norm_topk_prob", False),
            "moe_router_score_function": "softmax",
        },
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a Qwen3-MoE model."""
    layer, hf_layer = qwen3.LAYER, qwen3.HF_LAYER
    return (
        *qwen3.rules(model),
        WeightRule(f"{layer}.mlp.router.weight", (ROUTER,), "whole"),
        *qwen3.gated_mlp_rules(f"{layer}.mlp.experts.local_experts.{{expert}}", f"{hf_layer}.mlp.experts.{{expert}}"),
    )


def tensor_shapes(model: ModelShape) -> dict[str, tuple[int, ...]]:
    """What a Qwen3-MoE checkpoint stores, by the names of ``rules``."""
    hf_layer = qwen3.HF_LAYER
    return {
        **qwen3.tensor_shapes(model),
        ROUTER: (model.num_experts, model.hidden_size),
        **qwen3.gated_mlp_shapes(f"{hf_layer}.mlp.experts.{{expert}}", model.hidden_size, model.expert_hidden_size),
    }


FAMILY = Family("Qwen3MoeForCausalLM", shape, rules, tensor_shapes, router=ROUTER)
