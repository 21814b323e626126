"""Geometric-mean policy optimization, arXiv 2507.20673."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.base import Algorithm
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Gmpo(Algorithm):
    """-sum_i weight_i exp(mean_t l_it) A_i, l_it = log w_it clipped on the side to which A_i pushes.

    l_it = min(log w_it, log_clip_high) for A_i > 0 and max(log w_it, -log_clip_low) for A_i < 0: each token is clipped
    by itself, and the ratio is the geometric mean of what is left.
    """

    source: ClassVar = "arXiv 2507.20673, eq. 4 and section 4.1"
    clips: ClassVar = "tokens"
    clip_settings: ClassVar = ("log_clip_low", "log_clip_high")
    per_token: ClassVar = False

    name: Literal["gmpo"] = "gmpo"
    log_clip_low: PositiveFloat = 0.4
    """A token's log-ratio is at least -log_clip_low where A < 0."""
    log_clip_high: PositiveFloat = 0.4
    """A token's log-ratio is at most log_clip_high where A > 0."""

    def clip_range(self) -> tuple[float, float]:
        return -math.expm1(-self.log_clip_low), math.expm1(self.log_clip_high)

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.ratios import expand
        from megatron_gspo.algorithm.surrogate import geometric_loss, log_ratios

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        advantages_T = expand(shard.advantages_S, shard.sequence_T)
        low_T = (ratios.of_tokens_T < -self.log_clip_low) & (advantages_T < 0) & shard.mask_T
        high_T = (ratios.of_tokens_T > self.log_clip_high) & (advantages_T > 0) & shard.mask_T
        bounded_T = ratios.of_tokens_T.masked_fill(low_T, -self.log_clip_low).masked_fill(high_T, self.log_clip_high)
        return geometric_loss(shard, bounded_T, low_T, high_T, ratios, sequence_sum)
