"""Soft adaptive policy optimization, arXiv 2511.20347, eq. 6 and 7."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.base import Algorithm
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Sapo(Algorithm):
    """-sum_i weight_i / |y_i| sum_t (4 / tau) sigmoid(tau (w_it - 1)) A_it, tau by the sign of A_it.

    A gate in place of a clip: its slope is 1 at w = 1, as an unclipped ratio's, and falls off on both sides.
    """

    source: ClassVar = "arXiv 2511.20347, eq. 6 and 7"

    name: Literal["sapo"] = "sapo"
    tau_positive: PositiveFloat = 1.0
    """Temperature of the gate where A > 0."""
    tau_negative: PositiveFloat = 1.05
    """The same where A <= 0; above ``tau_positive``, it falls off faster."""

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        import torch

        from megatron_gspo.algorithm.surrogate import (
            LARGE_LOG_RATIO,
            choose,
            log_ratios,
            token_loss,
            trained_advantages,
        )

        ratios, advantages_T = log_ratios(shard, new_logprobs_T, sequence_sum), trained_advantages(shard)
        tau_T = choose(advantages_T > 0, self.tau_positive, self.tau_negative, advantages_T)
        excess_T = ratios.of_tokens_T.clamp(max=LARGE_LOG_RATIO).expm1()  # the gate is shut long before
        terms_T = 4 / tau_T * torch.sigmoid(tau_T * excess_T) * advantages_T
        nothing_T = torch.zeros_like(shard.mask_T)
        return token_loss(shard, terms_T, nothing_T, nothing_T, ratios, sequence_sum)
