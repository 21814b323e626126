"""Divergence proximal policy optimization, arXiv 2602.04879, with the binary form of total variation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from megatron_gspo.algorithm.base import Algorithm
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard

Probability = Annotated[float, Field(gt=0.0, le=1.0)]


class Dppo(Algorithm):
    """-sum_i weight_i / |y_i| sum_t m_it sg[min(r_it, max_ratio)] A_it log pi_it.

    m_it is 0 where the token's probability has moved too far from the anchor's, in the direction of A: pi - mu above
    clip_high with A > 0, or below -clip_low with A < 0. A ratio is large for a rare token that has hardly moved;
    a difference of probabilities is not. r is the ratio to the anchor.
    """

    source: ClassVar = "arXiv 2602.04879"
    clips: ClassVar = "tokens"

    name: Literal["dppo"] = "dppo"
    clip_low: Probability = 0.2
    """How far a token's probability may have fallen, where A < 0."""
    clip_high: Probability = 0.2
    """How far a token's probability may have risen, where A > 0."""
    max_ratio: PositiveFloat = 20.0
    """The weight of a token is at most this."""
    anchor: Literal["engine", "old"] = "engine"
    """The policy that tokens are held against: the one that drew them, as the paper has it, or pi_old."""

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        import math

        from megatron_gspo.algorithm.surrogate import log_ratios, token_loss, trained, trained_advantages

        ratios, advantages_T = log_ratios(shard, new_logprobs_T, sequence_sum), trained_advantages(shard)
        new_T = trained(shard, new_logprobs_T)
        anchor_T = shard.rollout_logprobs_T if self.anchor == "engine" else shard.old_logprobs_T
        anchor_T = trained(shard, anchor_T.to(new_T.dtype))
        moved_T = new_T.detach().exp() - anchor_T.exp()
        low_T = (moved_T < -self.clip_low) & (advantages_T < 0)
        high_T = (moved_T > self.clip_high) & (advantages_T > 0)
        weights_T = (new_T.detach() - anchor_T).clamp(max=math.log(self.max_ratio)).exp()
        terms_T = (weights_T * advantages_T).masked_fill(low_T | high_T, 0.0) * new_T
        return token_loss(shard, terms_T, low_T, high_T, ratios, sequence_sum)
