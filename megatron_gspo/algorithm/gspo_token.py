"""GSPO-token, arXiv 2507.18071, eq. 13: GSPO with an advantage for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.clipped import Below, Clipped
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class GspoToken(Clipped):
    """-sum_i weight_i / |y_i| sum_t min(s_it A_it, clip(s_it) A_it),  s_it = sg[s_i] pi_t / sg[pi_t].

    s_it has the value of s_i (pi / sg[pi] is exactly 1) and the gradient of the token's own log-probability. With
    A_it = A_i it equals GSPO in value, clip decisions and gradient.
    """

    source: ClassVar = "arXiv 2507.18071, eq. 13"
    clips: ClassVar = "responses"

    name: Literal["gspo-token"] = "gspo-token"
    clip_low: Below = 3e-4
    clip_high: PositiveFloat = 4e-4

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.ratios import expand
        from megatron_gspo.algorithm.surrogate import clipped_surrogate, log_ratios, token_loss, trained_advantages

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        straight_through_T = ratios.of_tokens_T - ratios.of_tokens_T.detach()  # 0 in value; the token's own gradient
        log_s_T = expand(ratios.of_responses_S.detach(), shard.sequence_T) + straight_through_T
        terms_T, low_T, high_T = clipped_surrogate(log_s_T, trained_advantages(shard), *self.clip_range())
        return token_loss(shard, terms_T, low_T, high_T, ratios, sequence_sum)
