"""Floating-point operations of a model, by formula.

A product of a token with a matrix of N elements is 2 N operations; backward is two such products for each of forward
(one for the input's gradient, one for the weight's), so that a step is 6 N a token and 8 N with full recompute (arXiv
2001.08361, 2.1; arXiv 2205.05198, 4). Of experts a token meets top_k. Causal attention over a sequence of n tokens
computes n^2 / 2 scores and as many sums of values: n^2 (d_k + d_v) operations a head (arXiv 2205.14135).
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_gspo.hf.family import ModelShape
from megatron_gspo.plan.models import Model


@dataclass(frozen=True)
class Forward:
    """Operations of a forward pass for one token, on average over sequences."""

    dense: float
    """Attention's projections, dense MLPs, shared experts, routers."""
    experts: float
    """The top_k experts of each layer."""
    attention: float
    """Scores and sums of values."""
    head: float

    @property
    def total(self) -> float:
        """Of all of it."""
        return self.dense + self.experts + self.attention + self.head


def value_dim(shape: ModelShape) -> int:
    """Width of a head's values: ``head_dim``, but in latent attention."""
    return int(shape.megatron.get("v_head_dim") or shape.head_dim)


def forward(model: Model, mean_length: float, square_length: float | None = None) -> Forward:
    """Of sequences whose length has this mean and this mean square (by default all of one length)."""
    matrices, shape = model.matrices, model.shape
    square = mean_length**2 if square_length is None else square_length
    pairs = square / mean_length  # n^2 of a sequence, over its tokens
    return Forward(
        dense=2.0 * matrices.dense,
        experts=2.0 * matrices.experts * matrices.share,
        attention=pairs * shape.num_layers * shape.num_attention_heads * (shape.head_dim + value_dim(shape)),
        head=2.0 * matrices.head,
    )


def training(once: Forward, recompute: str = "off", *, frozen: bool = False) -> float:
    """Operations a token of forward and backward, with what backward runs again.

    ``frozen``: weights that get no gradient (LoRA), whose products are then two and not three; adapters are left out.
    Attention's backward runs its scores again by itself: 2.5 times its forward (arXiv 2307.08691, 3.2). The head's
    logits are made again in any case.
    """
    products = 2.0 if frozen else 3.0
    total = products * (once.dense + once.experts) + 3.5 * once.attention + (products + 1) * once.head
    if recompute == "full":
        return total + once.dense + once.experts + once.attention
    if recompute == "selective":  # the feed-forward half: of dense layers' MLPs it counts nothing
        return total + once.experts
    return total
