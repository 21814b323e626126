"""What model families are made of: rules and shapes of embeddings, attention, MLPs and experts.

``*_rules`` say which Hugging Face tensors make up which Megatron parameter; ``*_shapes`` list the same tensors with
their shapes. Both read ``ModelShape`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.weights import Cut, WeightRule

LAYER = "decoder.layers.{layer}"
HF_LAYER = "model.layers.{layer}"
EXPERT, HF_EXPERT = f"{LAYER}.mlp.experts.local_experts.{{expert}}", f"{HF_LAYER}.mlp.experts.{{expert}}"
SHARED = f"{LAYER}.mlp.shared_experts"
SWIGLU = ("gate_proj", "up_proj", "down_proj")
"""Hugging Face names of a SwiGLU MLP's matrices, in most families."""


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


def dense_rules(model: ModelShape) -> Sequence[WeightRule]:
    """Every parameter of a dense model of these parts."""
    return (*frame_rules(model), *norm_rules(), *attention_rules(model), *dense_mlp_rules())


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
    """[q heads * d, ...], [groups * d, ...], [groups * d, ...] -> [groups * (heads per group + 2) * d, ...].

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


def dense_shapes(model: ModelShape) -> Shapes:
    """The tensors of ``dense_rules``."""
    return {
        **frame_shapes(model),
        **norm_shapes(model),
        **attention_shapes(model),
        **dense_mlp_shapes(model),
    }


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
