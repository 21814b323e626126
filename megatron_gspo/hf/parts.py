"""What model families are made of: rules and shapes of embeddings, attention, MLPs and experts.

``*_rules`` say which Hugging Face tensors make up which Megatron parameter; ``*_shapes`` list the same tensors with
their shapes. Both read ``ModelShape`` alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.weights import Cut, WeightRule

LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"
EXPERT, HF_EXPERT = f"{LAYER}.mlp.experts.local_experts.{{expert}}", f"{HF_LAYER}.mlp.experts.{{expert}}"
SHARED = f"{LAYER}.mlp.shared_experts"
SWIGLU = ("gate_proj", "up_proj", "down_proj")
"""Hugging Face names of a SwiGLU MLP's matrices, in most families."""


# --------------------------------------------------------------------------------------------------------- config.json


def dense_shape(config: dict[str, Any], **further: Any) -> ModelShape:
    """What every family's ``config.json`` says in the same words, as a dense model; ``further`` are fields beside it.

    Raises ConfigError for what no family here does.
    """
    refuse_everywhere(config)
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    fields = {
        "architecture": config["architectures"][0],
        "num_layers": layers,
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": config["intermediate_size"],
        "num_experts": 0,
        "top_k": 0,
        "expert_hidden_size": 0,
        "moe_layers": (False,) * layers,
        "rotary_base": rotary_base(config),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "tied_embeddings": bool(config.get("tie_word_embeddings")),
        "max_positions": config.get("max_position_embeddings", 32768),
        "megatron": {},
    }
    return ModelShape(**{**fields, **further})


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings: transformers 5's ``rope_parameters``, or the older ``rope_scaling``."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_type(config: dict[str, Any]) -> str:
    """ "default", "yarn", ..."""
    return rope(config).get("rope_type", rope(config).get("type", "default"))


def rotary_base(config: dict[str, Any], default: float = 10000.0) -> float:
    """The rotary base, from transformers 5's ``rope_parameters`` or the older ``rope_theta``."""
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta", config.get("rope_theta", default)))


def refuse_everywhere(config: dict[str, Any]) -> None:
    """Raises ConfigError for what a ``config.json`` may ask and no family here does."""
    refuse(config, "use_sliding_window", "clip_qkv", "router_jitter_noise")
    if config.get("quantization_config"):
        raise ConfigError(
            "quantization_config in config.json is not supported: servers would quantise what they are sent; "
            "megatron-gspo convert makes bfloat16 of fp8 blocks"
        )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f'hidden_act = "{config["hidden_act"]}" in config.json is not supported: only "silu"')


def refuse(config: dict[str, Any], *names: str) -> None:
    """Raises ConfigError for the first of these settings that is anything but false, 0, null or absent."""
    for name in names:
        if config.get(name):
            raise ConfigError(f"{name} = {json.dumps(config[name])} in config.json is not supported")


def refuse_scaled_rope(config: dict[str, Any]) -> None:
    """Raises ConfigError for rotary angles other than the default ones."""
    if rope_type(config) != "default":
        raise ConfigError(f'rope_type = "{rope_type(config)}" in config.json is not supported: only "default"')


def sparse_layers(config: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers Qwen's ``decoder_sparse_step`` and ``mlp_only_layers`` make mixtures of experts."""
    step = config.get("decoder_sparse_step") or 1
    dense = set(config.get("mlp_only_layers") or ())
    layers = range(config["num_hidden_layers"])
    if not all(type(layer) is int and layer in layers for layer in dense):
        raise ConfigError(f"mlp_only_layers = {sorted(map(str, dense))} in config.json are not layers of {len(layers)}")
    return tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)


def layers_after(config: dict[str, Any], default: int) -> tuple[bool, ...]:
    """Which layers are mixtures of experts where the first ``first_k_dense_replace`` are dense."""
    layers, dense = config["num_hidden_layers"], config.get("first_k_dense_replace", default)
    if type(dense) is not int or dense < 0:
        raise ConfigError(f"first_k_dense_replace = {dense!r:.80} in config.json is not a number of layers")
    return tuple(layer >= dense for layer in range(layers))


def predicting_layers(config: dict[str, Any]) -> int:
    """Multi-token-prediction layers that a checkpoint stores behind its last layer."""
    for name in ("num_nextn_predict_layers", "num_mtp_layers"):
        count = config.get(name) or 0
        if type(count) is not int or not 0 <= count < 100:
            raise ConfigError(f"{name} = {count!r:.80} in config.json is not a number of layers")
        if count:
            return count
    return 0


def softmax_router(normalised: bool) -> dict[str, Any]:
    """Megatron's settings for softmax scores.

    Dividing the chosen experts' probabilities by their sum is a softmax over the chosen logits; without it the
    probabilities of the softmax over all experts are used as they are (pre-softmax).
    """
    return {"moe_router_pre_softmax": not normalised, "moe_router_score_function": "softmax"}


def sigmoid_router(config: dict[str, Any]) -> dict[str, Any]:
    """Megatron's settings for DeepSeek-V3's router (arXiv 2412.19437, eq. 12-16).

    Experts are chosen by sigmoid(logit) + bias, within the best groups of them; their weights are the sigmoids alone,
    divided by their sum and scaled. The bias is no parameter: it is loaded, kept as it is, and sent on.

    Raises ConfigError where Megatron's router differs: it normalises whenever it chooses several, and scores a group
    by its best top_k / topk_group experts, where Hugging Face takes two.
    """
    top_k, normalised = config["num_experts_per_tok"], config.get("norm_topk_prob", True)
    if normalised != (top_k > 1):
        raise ConfigError(
            f"norm_topk_prob = {json.dumps(normalised)} with num_experts_per_tok = {top_k} in config.json is not "
            f"supported: Megatron's sigmoid router normalises the weights of several experts, and of one does not"
        )
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    limited = chosen < groups
    if limited and (top_k // chosen != 2 or config["n_routed_experts"] % groups):
        raise ConfigError(
            f"n_group = {groups}, topk_group = {chosen}, num_experts_per_tok = {top_k}, n_routed_experts = "
            f"{config['n_routed_experts']} in config.json are not supported: Megatron scores a group by its best "
            f"num_experts_per_tok // topk_group experts, which must be two, and groups must be of one size"
        )
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.0,
        "moe_router_num_groups": groups if limited else None,
        "moe_router_group_topk": chosen if limited else None,
        "moe_router_topk_scaling_factor": float(config.get("routed_scaling_factor", 1.0)),
    }


# --------------------------------------------------------------------------------------------------------------- rules


def frame_rules(model: ModelShape) -> Sequence[WeightRule]:
    """Embedding, final norm, and the head where it is not tied to the embedding."""
    rules = [
        WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary"),
        WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), "whole"),
    ]
    head = "model.embed_tokens.weight" if model.tied_embeddings else "lm_head.weight"
    return (*rules, WeightRule("output_layer.weight", (head,), "vocabulary"))


def plain_rule(megatron: str, hf: str, cut: Cut = "whole") -> WeightRule:
    """A parameter of a layer that is one tensor in both name spaces; names are those within the layer."""
    return WeightRule(f"{LAYER}.{megatron}", (f"{HF_LAYER}.{hf}",), cut)


def norm_rules() -> Sequence[WeightRule]:
    """The norms before attention and before the MLP."""
    return (
        plain_rule("input_layernorm.weight", "input_layernorm.weight"),
        plain_rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight"),
    )


def attention_rules(model: ModelShape) -> Sequence[WeightRule]:
    """Grouped-query attention; Megatron keeps query, key and value in one matrix (and one bias)."""

    def join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        return join_qkv(pieces, model.head_dim)

    def split(parameter: torch.Tensor) -> list[torch.Tensor]:
        return split_qkv(parameter, model.head_dim, model.num_attention_heads // model.num_query_groups)

    def qkv(kind: str) -> WeightRule:
        names = tuple(f"{HF_LAYER}.self_attn.{name}_proj.{kind}" for name in "qkv")
        return WeightRule(f"{LAYER}.self_attention.linear_qkv.{kind}", names, "rows", join, split)

    rules = [qkv("weight"), plain_rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "columns")]
    if model.megatron.get("add_qkv_bias"):
        rules.append(qkv("bias"))
    if model.megatron.get("qk_layernorm"):
        rules += [
            plain_rule(f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight") for name in "qk"
        ]
    return tuple(rules)


def dense_mlp_rules() -> Sequence[WeightRule]:
    """The MLP of a dense layer."""
    return gated_mlp_rules(f"{LAYER}.mlp", f"{HF_LAYER}.mlp")


def gated_mlp_rules(megatron: str, hf: str, names: Sequence[str] = SWIGLU) -> Sequence[WeightRule]:
    """A SwiGLU MLP: Megatron's first matrix is a rank's gate rows over its up rows."""
    gate, up, down = (f"{hf}.{name}.weight" for name in names)
    return (
        WeightRule(
            f"{megatron}.linear_fc1.weight",
            (gate, up),
            "rows",
            lambda pieces: torch.cat(list(pieces)),
            lambda parameter: list(parameter.chunk(2)),
        ),
        WeightRule(f"{megatron}.linear_fc2.weight", (down,), "columns"),
    )


def expert_rules(
    router: str = "mlp.gate.weight", expert: str = HF_EXPERT, names: Sequence[str] = SWIGLU
) -> Sequence[WeightRule]:
    """A router and its experts."""
    return (plain_rule("mlp.router.weight", router), *gated_mlp_rules(EXPERT, expert, names))


def bias_rule() -> WeightRule:
    """What a sigmoid router adds to scores when it chooses."""
    return plain_rule("mlp.router.expert_bias", "mlp.gate.e_score_correction_bias")


def join_qkv(pieces: Sequence[torch.Tensor], head_dim: int) -> torch.Tensor:
    """[q heads * d, ...], [groups * d, ...], [groups * d, ...] -> [groups * (heads a group + 2) * d, ...].

    Each key-value group's rows stand together: its query heads, then its key, then its value.
    """
    groups, width = pieces[1].shape[0] // head_dim, pieces[0].shape[1:]
    grouped = [piece.reshape(groups, piece.shape[0] // groups, *width) for piece in pieces]
    return torch.cat(grouped, dim=1).reshape(-1, *width)


def split_qkv(parameter: torch.Tensor, head_dim: int, heads_per_group: int) -> list[torch.Tensor]:
    """The inverse of ``join_qkv``."""
    width = parameter.shape[1:]
    grouped = parameter.reshape(-1, (heads_per_group + 2) * head_dim, *width)
    sizes = [heads_per_group * head_dim, head_dim, head_dim]
    return [piece.reshape(-1, *width) for piece in grouped.split(sizes, dim=1)]


# -------------------------------------------------------------------------------------------------------------- shapes

Shapes = dict[str, tuple[int, ...]]


def frame_shapes(model: ModelShape) -> Shapes:
    """The tensors of ``frame_rules``."""
    vocabulary = (model.vocab_size, model.hidden_size)
    head = {} if model.tied_embeddings else {"lm_head.weight": vocabulary}
    return {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (model.hidden_size,), **head}


def norm_shapes(model: ModelShape) -> Shapes:
    """The tensors of ``norm_rules``."""
    return {f"{HF_LAYER}.{name}_layernorm.weight": (model.hidden_size,) for name in ("input", "post_attention")}


def attention_shapes(model: ModelShape) -> Shapes:
    """The tensors of ``attention_rules``."""
    hidden, prefix = model.hidden_size, f"{HF_LAYER}.self_attn"
    query, key = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    rows = {"q": query, "k": key, "v": key}
    shapes: Shapes = {f"{prefix}.{name}_proj.weight": (rows[name], hidden) for name in "qkv"}
    shapes[f"{prefix}.o_proj.weight"] = (hidden, query)
    if model.megatron.get("add_qkv_bias"):
        shapes |= {f"{prefix}.{name}_proj.bias": (rows[name],) for name in "qkv"}
    if model.megatron.get("qk_layernorm"):
        shapes |= {
            f"{prefix}.{name}_norm.weight": (rows[name] if model.norm_over_heads else model.head_dim,) for name in "qk"
        }
    return shapes


def dense_mlp_shapes(model: ModelShape) -> Shapes:
    """The tensors of ``dense_mlp_rules``."""
    return gated_mlp_shapes(f"{HF_LAYER}.mlp", model.hidden_size, model.ffn_hidden_size)


def gated_mlp_shapes(hf: str, hidden: int, ffn: int, names: Sequence[str] = SWIGLU) -> Shapes:
    """The three matrices of a SwiGLU MLP."""
    gate, up, down = (f"{hf}.{name}.weight" for name in names)
    return {gate: (ffn, hidden), up: (ffn, hidden), down: (hidden, ffn)}


def expert_shapes(
    model: ModelShape, router: str = "mlp.gate.weight", expert: str = HF_EXPERT, names: Sequence[str] = SWIGLU
) -> Shapes:
    """The tensors of ``expert_rules``."""
    return {
        f"{HF_LAYER}.{router}": (model.num_experts, model.hidden_size),
        **gated_mlp_shapes(expert, model.hidden_size, model.expert_hidden_size, names),
    }


def bias_shapes(model: ModelShape) -> Shapes:
    """The tensor of ``bias_rule``."""
    return {f"{HF_LAYER}.mlp.gate.e_score_correction_bias": (model.num_experts,)}
