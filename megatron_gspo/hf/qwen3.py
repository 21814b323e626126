"""Qwen3, dense: grouped-query attention with RMSNorm on each head's query and key, SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import WeightRule

LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"


def shape(config: dict[str, Any]) -> ModelShape:
    """Reads a Qwen3 ``config.json``."""
    refuse_unsupported(config)
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    return ModelShape(
        architecture=config["architectures"][0],
        num_layers=layers,
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        ffn_hidden_size=config["intermediate_size"],
        num_experts=0,
        top_k=0,
        expert_hidden_size=0,
        moe_layers=(False,) * layers,
        rotary_base=rotary_base(config),
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        max_positions=config.get("max_position_embeddings", 32768),
        megatron={"qk_layernorm": True},
    )


def rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a Qwen3 model."""
    return (*frame_rules(model), *attention_rules(model), *dense_mlp_rules())


def tensor_shapes(model: ModelShape) -> dict[str, tuple[int, ...]]:
    """What a Qwen3 checkpoint stores, by the names of ``rules``."""
    hidden, ffn, dim = model.hidden_size, model.ffn_hidden_size, model.head_dim
    heads, groups = model.num_attention_heads * dim, model.num_query_groups * dim
    vocabulary = (model.vocab_size, hidden)
    head = {} if model.tied_embeddings else {"lm_head.weight": vocabulary}
    return {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": (hidden,),
        **head,
        f"{HF_LAYER}.input_layernorm.weight": (hidden,),
        f"{HF_LAYER}.post_attention_layernorm.weight": (hidden,),
        f"{HF_LAYER}.self_attn.q_norm.weight": (dim,),
        f"{HF_LAYER}.self_attn.k_norm.weight": (dim,),
        f"{HF_LAYER}.self_attn.q_proj.weight": (heads, hidden),
        f"{HF_LAYER}.self_attn.k_proj.weight": (groups, hidden),
        f"{HF_LAYER}.self_attn.v_proj.weight": (groups, hidden),
        f"{HF_LAYER}.self_attn.o_proj.weight": (hidden, heads),
        **gated_mlp_shapes(f"{HF_LAYER}.mlp", hidden, ffn),
    }


def gated_mlp_shapes(hf: str, hidden: int, ffn: int) -> dict[str, tuple[int, ...]]:
    """The three matrices of a SwiGLU MLP."""
    return {
        f"{hf}.gate_proj.weight": (ffn, hidden),
        f"{hf}.up_proj.weight": (ffn, hidden),
        f"{hf}.down_proj.weight": (hidden, ffn),
    }


def frame_rules(model: ModelShape) -> Sequence[WeightRule]:
    """Embedding, final norm, and the head where it is not tied to the embedding."""
    rules = [
        WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
        WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    ]
    head = "model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight"
    return (*rules, WeightRule("output_layer.weight", (head,), "vocabulary"))


def attention_rules(model: ModelShape) -> Sequence[WeightRule]:
    """Norms and attention of a layer; Megatron keeps query, key and value in one matrix."""
    projections = tuple(f"{HF_LAYER}.self_attn.{name}_proj.weight" for name in "qkv")

    def join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return join_qkv(pieces, model.head_dim)

    def split(parameter: torch.Tensor) -> list[torch.Tensor]:
        return split_qkv(parameter, model.head_dim, model.num_attention_heads // model.num_query_groups)

    def norm(megatron: str, hf: str) -> WeightRule:
        return WeightRule(f"{LAYER}.{megatron}.weight", (f"{HF_LAYER}.{hf}.weight",), "whole")

    return (
        norm("input_layernorm", "input_layernorm"),
        norm("pre_mlp_layernorm", "post_attention_layernorm"),
        norm("self_attention.q_layernorm", "self_attn.q_norm"),
        norm("self_attention.k_layernorm", "self_attn.k_norm"),
        WeightRule(f"{LAYER}.self_attention.linear_qkv.weight", projections, "rows", join, split),
        WeightRule(f"{LAYER}.self_attention.linear_proj.weight", (f"{HF_LAYER}.self_attn.o_proj.weight",), "columns"),
    )


def dense_mlp_rules() -> Sequence[WeightRule]:
    """The MLP of a dense layer."""
    return gated_mlp_rules(f"{LAYER}.mlp", f"{HF_LAYER}.mlp")


def gated_mlp_rules(megatron: str, hf: str) -> Sequence[WeightRule]:
    """A SwiGLU MLP: Megatron's first matrix is a rank's gate rows over its up rows."""
    return (
        WeightRule(
            f"{megatron}.linear_fc1.weight",
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            "rows",
            lambda pieces: torch.cat(list(pieces)),
            lambda parameter: list(parameter.chunk(2)),
        ),
        WeightRule(f"{megatron}.linear_fc2.weight", (f"{hf}.down_proj.weight",), "columns"),
    )


def join_qkv(pieces: Sequence[torch.Tensor], head_dim: int) -> torch.Tensor:
    """[q heads * d, H], [groups * d, H], [groups * d, H] -> [groups * (heads a group + 2) * d, H].

    Each key-value group's rows stand together: its query heads, then its key, then its value.
    """
    query, key, value = pieces
    groups = key.shape[0] // head_dim
    grouped = [piece.reshape(groups, -1, piece.shape[-1]) for piece in (query, key, value)]
    return torch.cat(grouped, dim=1).reshape(-1, query.shape[-1])


def split_qkv(parameter: torch.Tensor, head_dim: int, heads_per_group: int) -> list[torch.Tensor]:
    """The inverse of ``join_qkv``."""
    hidden = parameter.shape[-1]
    grouped = parameter.reshape(-1, (heads_per_group + 2) * head_dim, hidden)
    sizes = [heads_per_group * head_dim, head_dim, head_dim]
    return [piece.reshape(-1, hidden) for piece in grouped.split(sizes, dim=1)]


def rotary_base(config: dict[str, Any]) -> float:
    """The rotary base, from transformers 5's ``rope_parameters`` or the older ``rope_theta``."""
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))


def refuse_unsupported(config: dict[str, Any]) -> None:
    """Raises ConfigError for what a ``config.json`` may ask and this table does not do."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f'rope_type = "{kind}" in config.json is not supported: only "default"')
    for name in ("attention_bias", "use_sliding_window"):
        if config.get(name):
            raise ConfigError(f"{name} = true in config.json is not supported")
    if config.get("quantization_config"):
        raise ConfigError("quantization_config in config.json is not supported: weights must be floating-point numbers")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f'hidden_act = "{config["hidden_act"]}" in config.json is not supported: only "silu"')


FAMILY = Family("Qwen3ForCausalLM", shape, rules, tensor_shapes)
