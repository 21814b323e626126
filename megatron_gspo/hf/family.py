"""What a model family is: how its configuration and its weights read in Megatron's terms.

A family is one file that builds a ``Family`` and one entry in ``FAMILIES`` of ``hf/catalog.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gspo.hf.rotary import ScaledRope
from megatron_gspo.hf.weights import WeightRule
from megatron_gspo.types import RouteShape


@dataclass(frozen=True)
class ModelShape:
    """A model in Megatron's terms, read from a Hugging Face ``config.json``."""

    architecture: str
    """Hugging Face class name."""
    num_layers: int
    hidden_size: int
    vocab_size: int
    """Rows of the Hugging Face embedding; rows that a layout pads on top are masked out of every softmax."""
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads."""
    head_dim: int
    ffn_hidden_size: int
    """Of a dense layer."""
    num_experts: int
    """0 for a dense model."""
    top_k: int
    expert_hidden_size: int
    moe_layers: tuple[bool, ...]
    """[L]: whether each layer is a mixture of experts."""
    rotary_base: float
    norm_epsilon: float
    tied_embeddings: bool
    max_positions: int
    megatron: dict[str, Any]
    """Further ``TransformerConfig`` settings of the family (router, qk-norm, latent attention)."""
    shared_expert_hidden_size: int = 0
    """Of the experts, together, that every token goes through; 0 for none."""
    norm_over_heads: bool = False
    """Whether qk-norm is one norm over all heads of a token instead of one over each."""
    rotary_fraction: float = 1.0
    """Part of a head's dimensions, from the first on, that the rotary embedding turns."""
    scaled_rope: ScaledRope | None = None
    """How its frequencies are scaled for contexts that are longer than the first; latent attention has its own words
    for it in ``megatron``."""
    carried_layers: int = 0
    """Layers that checkpoints store behind the last one (multi-token prediction): nothing here computes them, and a
    saved directory gets them from the one that was loaded, byte for byte."""

    @property
    def routes(self) -> RouteShape:
        """What the routes of its tokens look like."""
        return RouteShape(self.moe_layers, self.top_k, self.num_experts)


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture."""

    architecture: str
    shape: Callable[[dict[str, Any]], ModelShape]
    """``config.json`` -> ModelShape; raises ConfigError for a feature that is not supported."""
    rules: Callable[[ModelShape], Sequence[WeightRule]]
    tensor_shapes: Callable[[ModelShape], Mapping[str, tuple[int, ...]]]
    """Hugging Face name, as in ``rules`` -> the stored tensor's shape: what a checkpoint's headers are held against."""
    defaults: Mapping[str, Any]
    """What keys that ``config.json`` may leave out mean: transformers' own defaults, which ``shape`` puts there."""

    def router_names(self, shape: ModelShape) -> frozenset[str]:
        """Hugging Face names of the weights that choose experts; empty for a dense model."""
        return self._names_of_router(shape, "weight")

    def bias_names(self, shape: ModelShape) -> frozenset[str]:
        """Hugging Face names of what is added to scores when experts are chosen: float32 in a model of any dtype."""
        return self._names_of_router(shape, "expert_bias")

    def _names_of_router(self, shape: ModelShape, parameter: str) -> frozenset[str]:
        (names,) = {rule.hf for rule in self.rules(shape) if rule.megatron.endswith(f".mlp.router.{parameter}")} or {()}
        layers = [layer for layer, moe in enumerate(shape.moe_layers) if moe]
        return frozenset(name.format(layer=layer) for name in names for layer in layers)
