"""Group Sequence Policy Optimization, arXiv 2507.18071, eq. 5."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.clipped import Below, Clipped
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Gspo(Clipped):
    """-sum_i weight_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i),  s_i = exp(mean_t(new_t - old_t)).

    The ratio is of the whole response, normalised by its length; a response is clipped as one. Without clipping its
    gradient is weight_i s_i A_i / |y_i| for each of its tokens.
    """

    source: ClassVar = "arXiv 2507.18071, eq. 5 and section 5.1"
    clips: ClassVar = "responses"
    per_token: ClassVar = False

    name: Literal["gspo"] = "gspo"
    clip_low: Below = 3e-4
    clip_high: PositiveFloat = 4e-4

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.surrogate import clipped_surrogate, log_ratios, response_loss

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        terms_S, low_S, high_S = clipped_surrogate(ratios.of_responses_S, shard.advantages_S, *self.clip_range())
        return response_loss(shard, terms_S, low_S, high_S, ratios)
