"""A model's tensors, listed from its family's tables: what a checkpoint must hold and where a layout puts it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod

from megatron_gspo.config import LoraConfig, ParallelConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.hf.layout import stage_layers
from megatron_gspo.hf.lora import every_adapter
from megatron_gspo.hf.weights import Cut, padded_vocab_size

MOST_TENSORS = 2_000_000
"""A config.json that asks for more is mistyped: it would take this list minutes, and no model has so many."""
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class Tensor:
    """One Hugging Face tensor, as the family's table has it."""

    name: str
    shape: tuple[int, ...]
    cut: Cut
    megatron: str
    """The rule's own name of the parameter that it is part of."""
    layer: int | None
    """None outside the layers."""
    is_expert: bool

    def local_size(self, tensor: int, expert_tensor: int) -> int:
        """Elements that one tensor rank holds; a vocabulary is padded to a multiple of the ranks."""
        ranks = expert_tensor if self.is_expert else tensor
        if self.cut == "whole":
            return prod(self.shape)
        if self.cut == "vocabulary":
            return padded_vocab_size(self.shape[0], ranks) // ranks * prod(self.shape[1:])
        return prod(self.shape) // ranks


def tensors_of(family: Family, model: ModelShape) -> Iterator[Tensor]:
    """Every tensor of a model; a tied head is the embedding's name a second time. Raises ConfigError if absurd."""
    count = model.num_layers * (12 + 3 * model.num_experts)
    if count > MOST_TENSORS:
        raise ConfigError(
            f"config.json asks for {model.num_layers} layers of {model.num_experts} experts, some {count} tensors: "
            f"is a number mistyped?"
        )
    shapes = family.tensor_shapes(model)
    for rule in family.rules(model):
        for layer in range(model.num_layers) if "{layer}" in rule.megatron else (None,):
            if layer is None or rule.in_layer(model.moe_layers[layer]):
                for expert in range(model.num_experts) if rule.is_expert else (None,):
                    for name in rule.hf:
                        filled = name.format(layer=layer, expert=expert)
                        yield Tensor(filled, shapes[name], rule.cut, rule.megatron, layer, rule.is_expert)


def adapters_of(family: Family, model: ModelShape, lora: LoraConfig) -> Iterator[Tensor]:
    """Every matrix of a model's adapters. Raises ConfigError for targets that it does not have."""
    for adapter in every_adapter(family, model, lora):
        rule = adapter.rule
        yield Tensor(adapter.name, adapter.shape, rule.cut, rule.megatron, adapter.layer, rule.is_expert)


def stage_of(layer: int, num_layers: int, parallel: ParallelConfig) -> int:
    """The pipeline stage that holds a layer: stages take turns at the chunks of ``hf.layout.stage_layers``."""
    return bisect_right(_ends(parallel, num_layers), layer) % parallel.pipeline


@lru_cache(maxsize=64)
def _ends(parallel: ParallelConfig, num_layers: int) -> tuple[int, ...]:
    """The layer behind each chunk: it is asked for every tensor."""
    return tuple(accumulate(stage_layers(parallel, num_layers)))


def elements_of_stage(tensors: tuple[Tensor, ...], model: ModelShape, parallel: ParallelConfig, stage: int) -> Elements:
    """Parameters that a rank of one pipeline stage holds."""
    layers = {layer for layer in range(model.num_layers) if stage_of(layer, model.num_layers, parallel) == stage}
    dense = expert = 0
    for tensor in tensors:
        if not _on_stage(tensor, model, parallel, stage, layers):
            continue
        size = tensor.local_size(parallel.tensor, parallel.expert_tensor)
        if tensor.is_expert:
            expert += size
        else:
            dense += size
    return Elements(dense, expert // parallel.expert)


@dataclass(frozen=True)
class Elements:
    """Parameters of one rank."""

    dense: int
    expert: int

    @property
    def total(self) -> int:
        """Of both kinds."""
        return self.dense + self.expert


def _on_stage(tensor: Tensor, model: ModelShape, parallel: ParallelConfig, stage: int, layers: set[int]) -> bool:
    last = parallel.pipeline - 1
    if tensor.layer is not None:
        return tensor.layer in layers
    if tensor.megatron == EMBEDDING:
        return stage == 0
    if tensor.megatron == HEAD and model.tied_embeddings:
        return stage == last and last > 0  # on one stage, the head is the embedding itself
    return stage == last
