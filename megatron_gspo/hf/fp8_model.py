"""Which matrices of a model are stored in eight bits, how ``config.json`` says so, and which sizes servers then take.

Those of attention, MLPs and experts are; embedding, head, norms, biases, routers and gates of shared experts are not.
So are DeepSeek-V3's and Qwen3's published FP8 directories, and SGLang 0.5.23 makes the layers of every family so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import ceil, prod
from typing import Any

from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.fp8 import BLOCK, SCALE, WRITTEN
from megatron_gspo.hf.weights import WeightRule

KEPT = (".mlp.router.weight", ".mlp.shared_experts.gate_weight")
"""How Megatron's names of matrices end that stay as they are; a vocabulary's do, too."""
BESIDE = ("self_attn.q_a_proj.weight",)
"""Matrices below which SGLang puts another one that our tables keep apart: their rows must be whole blocks."""
REPLICATED = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
"""Matrices of which each rank has a head at least."""


def in_eight_bits(family: Family, model: ModelShape) -> Callable[[str], bool]:
    """Whether the tensor of a Hugging Face name is; in layers that are carried, those named as in others are, too."""
    forms = {_form(name) for rule in _rules(family, model) for name in rule.hf}
    return lambda name: _form(name) in forms


def quantization_config(family: Family, model: ModelShape) -> dict[str, Any]:
    """Of the model's ``config.json``, with the linear layers that stay as they are by name: whoever makes layers from
    it would take them for others."""
    linear = [rule.hf[0] for rule in family.rules(model) if rule.megatron.endswith(KEPT)]
    layers = [layer for layer, is_moe in enumerate(model.moe_layers) if is_moe]
    kept = [name.removesuffix(".weight").format(layer=layer) for layer in layers for name in linear]
    return WRITTEN | {"modules_to_not_convert": ["lm_head", *kept]}


def with_scales(names: set[str], chosen: Callable[[str], bool]) -> set[str]:
    """Names of what is sent for the tensors ``names``, of which those ``chosen`` are in eight bits."""
    return names | {name + SCALE for name in names if chosen(name)}


def served_bytes(family: Family, model: ModelShape, item: int, *, eight_bits: bool) -> int:
    """Bytes of a model's weights as they are sent and as servers hold them; a tied head is the embedding.

    ``item`` bytes a number; with ``eight_bits``, of the matrices that are stored so, one, and a float32 scale a block.
    """
    shapes, total = family.tensor_shapes(model), 0
    narrow = {rule.megatron for rule in _rules(family, model)} if eight_bits else set()
    once: set[str] = set()
    for rule in family.rules(model):
        times = model.num_experts if rule.is_expert else 1
        if "{layer}" in rule.megatron:
            times *= sum(rule.in_layer(is_moe) for is_moe in model.moe_layers)
        for name in set(rule.hf) - once:
            shape = shapes[name]
            scales = 4 * prod(ceil(size / BLOCK) for size in shape)
            total += times * (prod(shape) + scales if rule.megatron in narrow else item * prod(shape))
        once |= {name for name in rule.hf if "{layer}" not in name}
    return total


def misfits(family: Family, model: ModelShape, *, attention: int, dense: int, experts: int) -> list[str]:
    """What is no multiple of a block on one of a server's ranks; empty where SGLang 0.5.23 takes the model.

    ``attention``, ``dense`` and ``experts`` are the ranks over which matrices of each kind are cut. SGLang raises for
    matrices that it puts on top of one another (query, key and value; gate and up), or cuts, where a block would
    belong to two. Its kernels round activations in groups of 128, so that every input must be whole groups.
    """
    shapes, found = family.tensor_shapes(model), {}
    for rule in _rules(family, model):
        parts = experts if rule.is_expert else attention if ".self_attention." in rule.megatron else dense
        for name in rule.hf:
            rows, columns = shapes[name]
            if rule.cut == "rows":
                rows = max(rows // parts, model.head_dim if name.endswith(REPLICATED) else 1)
            columns = columns // parts if rule.cut == "columns" else columns
            shared = len(rule.hf) > 1 or name.endswith(BESIDE) or (rule.cut == "rows" and parts > 1)
            if columns % BLOCK or (shared and rows % BLOCK):
                found[re.sub(r"^.*?\{layer\}\.|\{\w+\}\.", "", name)] = f"{rows} x {columns}"
    return [f"{name} is {size}" for name, size in found.items()]


def _rules(family: Family, model: ModelShape) -> Iterator[WeightRule]:
    """Those of matrices in eight bits, of layers that the model has."""
    shapes = family.tensor_shapes(model)
    for rule in family.rules(model):
        matrix = all(len(shapes[name]) == 2 for name in rule.hf)
        there = any(rule.in_layer(is_moe) for is_moe in set(model.moe_layers))
        if matrix and rule.cut != "vocabulary" and not rule.megatron.endswith(KEPT) and there:
            yield rule


def _form(name: str) -> str:
    """A name with ``#`` for each number, as for ``{layer}`` and ``{expert}``."""
    return re.sub(r"\{\w+\}|(?<=\.)\d+(?=\.)", "#", name)
