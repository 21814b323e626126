"""Variational sequence-level soft policy optimization, arXiv 2602.10693."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.base import Aggregation, Algorithm
from megatron_gspo.section import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard

TOKEN_BOUND = 20.0
"""A token's log-ratio is kept within +- this before it is summed."""
LEAST_LOG_WEIGHT = math.log(1e-8)


class Vespo(Algorithm):
    """-sum_i weight_i / |y_i| sum_t sg[phi(w_i)] A_it log pi_it,  phi(w) = w^k exp(lambda (1 - w)),  w_i = prod_t w_it.

    The weight is of the whole response, not normalised by its length, and phi, which is 1 at w = 1, lets it fall off
    smoothly on both sides; k and lambda by the sign of A.
    """

    source: ClassVar = "arXiv 2602.10693"

    name: Literal["vespo"] = "vespo"
    aggregation: Aggregation = "token-mean"
    k_positive: NonNegativeFloat = 2.0
    """k where A >= 0."""
    lambda_positive: PositiveFloat = 3.0
    """lambda where A >= 0."""
    k_negative: NonNegativeFloat = 3.0
    """k where A < 0."""
    lambda_negative: PositiveFloat = 2.0
    """lambda where A < 0."""

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        import torch

        from megatron_gspo.algorithm.ratios import expand
        from megatron_gspo.algorithm.surrogate import choose, log_ratios, token_loss, trained, trained_advantages

        ratios, advantages_T = log_ratios(shard, new_logprobs_T, sequence_sum), trained_advantages(shard)
        bounded_T = ratios.of_tokens_T.detach().clamp(-TOKEN_BOUND, TOKEN_BOUND)
        log_w_S = sequence_sum(bounded_T, shard.sequence_T, shard.num_sequences).clamp(min=LEAST_LOG_WEIGHT)
        log_w_T = expand(log_w_S, shard.sequence_T)
        k_T = choose(advantages_T < 0, self.k_negative, self.k_positive, advantages_T)
        lambda_T = choose(advantages_T < 0, self.lambda_negative, self.lambda_positive, advantages_T)
        phi_T = (k_T * log_w_T - lambda_T * log_w_T.expm1()).exp()
        terms_T = phi_T * advantages_T * trained(shard, new_logprobs_T)
        nothing_T = torch.zeros_like(shard.mask_T)
        return token_loss(shard, terms_T, nothing_T, nothing_T, ratios, sequence_sum)
