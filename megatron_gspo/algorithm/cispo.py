"""Clipped importance-sampling weights, arXiv 2506.13585 (CISPO), eq. 4 and 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from megatron_gspo.algorithm.base import Aggregation, Algorithm
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Cispo(Algorithm):
    """-sum_i weight_i / |y_i| sum_t sg[clip(w_it, 1 - clip_low, 1 + clip_high)] A_it log pi_it.

    The weight is clipped and not the gradient: every token keeps one. The paper leaves the lower bound out and does not
    state the upper one; 1 + 4 is what others call an upper bound of 5. Tokens whose weight was clipped, on either side
    and whatever the sign of A, count as clipped.
    """

    source: ClassVar = "arXiv 2506.13585, eq. 4 and 5"
    clips: ClassVar = "tokens"

    name: Literal["cispo"] = "cispo"
    aggregation: Aggregation = "group-token-mean"
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The weight is at least 1 - clip_low; 1 is no bound."""
    clip_high: PositiveFloat = 4.0
    """The weight is at most 1 + clip_high."""

    def clip_range(self) -> tuple[float, float]:
        return self.clip_low, self.clip_high

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.surrogate import log_range, log_ratios, token_loss, trained, trained_advantages

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        log_w_T = ratios.of_tokens_T.detach()
        floor, ceiling = log_range(self.clip_low, self.clip_high)
        weights_T = log_w_T.clamp(floor, ceiling).exp()
        terms_T = weights_T * trained_advantages(shard) * trained(shard, new_logprobs_T)
        return token_loss(shard, terms_T, log_w_T < floor, log_w_T > ceiling, ratios, sequence_sum)
