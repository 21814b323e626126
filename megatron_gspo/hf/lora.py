"""Low-rank adapters in Hugging Face names: which matrices of a family get one, and how each lies over ranks.

An adapter of ``...q_proj.weight`` [out, in] is ``...q_proj.lora_A.weight`` [r, in] and ``...q_proj.lora_B.weight``
[out, r]; the adapted weight is W + scale x B A. Tensor ranks that hold rows of W hold the same rows of B and all of A;
those that hold columns of W, the same columns of A and all of B: so a rank's piece of W gets its piece of B A from what
that rank has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_gspo.config import LoraConfig
from megatron_gspo.config.lora import ALL_LINEAR
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.weights import Cut, WeightRule

MATRIX = re.compile(r".+\.linear_\w+\.weight")
"""Megatron names of what may get an adapter: the matrices of attention, MLPs and experts."""
INSIDE = ".lora."
"""Stands in the Megatron name of an adapter's parameter, between its layer's name and its own."""
A, B = "lora_A", "lora_B"
PEFT_PREFIX = "base_model.model."
"""Before every name in PEFT's files."""


@dataclass(frozen=True)
class Target:
    """One Hugging Face matrix of a rule that gets an adapter; names have ``{layer}`` and ``{expert}``."""

    rule: WeightRule
    weight: str
    """Its name, one of ``rule.hf``."""

    @property
    def projection(self) -> str:
        """``q_proj``."""
        return self.weight.rsplit(".", 2)[1]

    def name(self, part: str) -> str:
        """Hugging Face name of an adapter's ``A`` or ``B``."""
        return adapter_name(self.weight, part)

    def rules(self) -> tuple[WeightRule, WeightRule]:
        """Of A and of B, under the Megatron names that ``megatron.lora`` gives them."""
        inside = self.rule.megatron.removesuffix(".weight") + INSIDE + self.projection
        cut_a: Cut = "columns" if self.rule.cut == "columns" else "whole"
        cut_b: Cut = "rows" if self.rule.cut == "rows" else "whole"
        return WeightRule(f"{inside}_A", (self.name(A),), cut_a), WeightRule(f"{inside}_B", (self.name(B),), cut_b)


def adapter_name(weight: str, part: str) -> str:
    """The name of an adapter's part, of the name of the matrix that it stands on."""
    return f"{weight.removesuffix('weight')}{part}.weight"


def adapted_weight(name: str) -> str:
    """The weight that an adapter's matrix of this name belongs to."""
    return f"{name.rsplit('.', 2)[0]}.weight"


def lora_targets(family: Family, model: ModelShape, lora: LoraConfig) -> tuple[Target, ...]:
    """The matrices that ``lora.targets`` names. Raises ConfigError for a name that stands for none of them."""
    if not lora.rank:
        return ()
    every = linear_targets(family, model)
    if lora.targets == (ALL_LINEAR,):
        return every
    for name in lora.targets:
        if not any(matches(target.weight, name) for target in every):
            raise ConfigError(_no_target(name, every, family, model))
    return tuple(target for target in every if any(matches(target.weight, name) for name in lora.targets))


def linear_targets(family: Family, model: ModelShape) -> tuple[Target, ...]:
    """Every matrix of a model that may get an adapter."""
    rules = [rule for rule in family.rules(model) if MATRIX.fullmatch(rule.megatron) and _exists(rule, model)]
    return tuple(Target(rule, name) for rule in rules for name in rule.hf)


def matches(weight: str, name: str) -> bool:
    """Whether a name of ``lora.targets`` stands for a matrix: it is how the matrix's own ends, numbers left out."""
    path = [word for word in weight.removesuffix(".weight").split(".") if not (word[0] == "{" or word.isdigit())]
    words = name.split(".")
    return path[-len(words) :] == words


def leaf_names(targets: Iterable[Target]) -> list[str]:
    """What the targets are called, each once: ``q_proj``, ..."""
    return list(dict.fromkeys(target.projection for target in targets))


def adapter_rules(targets: Sequence[Target]) -> tuple[WeightRule, ...]:
    """Of all adapters' parameters."""
    return tuple(rule for target in targets for rule in target.rules())


@dataclass(frozen=True)
class AdapterTensor:
    """One of the two matrices of one adapter of a model."""

    name: str
    """Hugging Face's."""
    shape: tuple[int, int]
    rule: WeightRule
    layer: int


def every_adapter(family: Family, model: ModelShape, lora: LoraConfig) -> Iterator[AdapterTensor]:
    """Every adapter's two matrices, in every layer and expert."""
    shapes = family.tensor_shapes(model)
    for target in lora_targets(family, model, lora):
        outputs, inputs = shapes[target.weight]
        sizes = ((lora.rank, inputs), (outputs, lora.rank))
        for layer in (layer for layer, is_moe in enumerate(model.moe_layers) if _in_layer(target.rule, model, is_moe)):
            for expert in range(model.num_experts) if target.rule.is_expert else (None,):
                for rule, shape in zip(target.rules(), sizes, strict=True):
                    yield AdapterTensor(rule.hf[0].format(layer=layer, expert=expert), shape, rule, layer)


def merge(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """W + scale x B A in float32 or better, rounded once to W's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(wide), b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


def _exists(rule: WeightRule, model: ModelShape) -> bool:
    return any(_in_layer(rule, model, is_moe) for is_moe in model.moe_layers)


def _in_layer(rule: WeightRule, model: ModelShape, is_moe: bool) -> bool:
    """Whether such a layer of this model has it, which may have no shared experts."""
    shared = ".mlp.shared_experts." in rule.megatron
    return rule.in_layer(is_moe) and (not shared or model.shared_expert_hidden_size > 0)


def _no_target(name: str, every: Sequence[Target], family: Family, model: ModelShape) -> str:
    others = [other for rule in family.rules(model) for other in rule.hf if other.endswith(".weight")]
    if any(matches(other, name) for other in others):
        return (
            f'lora.targets: "{name}" of {family.architecture} gets no adapter: only matrices of attention, MLPs and '
            f"experts do: {', '.join(leaf_names(every))}"
        )
    return (
        f'lora.targets: {family.architecture} with these layers has no matrix "{name}": it has '
        f'{", ".join(leaf_names(every))} ("{ALL_LINEAR}" is all of them)'
    )
