"""Length-unbiased sequence policy optimization, arXiv 2602.05261."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.clipped import Below, Clipped
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Luspo(Clipped):
    """-sum_i weight_i |y_i| min(s_i A_i, clip(s_i) A_i): GSPO's term times the length of its response.

    GSPO gives each token of a response 1 / |y_i| of its gradient, so that long responses move less for each token;
    here every token has the same share.
    """

    source: ClassVar = "arXiv 2602.05261"
    clips: ClassVar = "responses"
    per_token: ClassVar = False

    name: Literal["luspo"] = "luspo"
    clip_low: Below = 2e-3
    clip_high: PositiveFloat = 2.5e-3

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.surrogate import clipped_surrogate, log_ratios, response_loss

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        terms_S, low_S, high_S = clipped_surrogate(ratios.of_responses_S, shard.advantages_S, *self.clip_range())
        return response_loss(shard, shard.lengths_S * terms_S, low_S, high_S, ratios)
