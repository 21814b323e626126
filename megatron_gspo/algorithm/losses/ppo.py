"""The clipped objective of Proximal Policy Optimization, arXiv 1707.06347, eq. 7, with supplied advantages."""

from __future__ import annotations

import torch

from megatron_gspo.algorithm.losses.surrogate import log_ratios, token_loss
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


def ppo(
    shard: TokenShard,
    new_logprobs_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """-sum_i weight_i / |y_i| sum_t min(w_it A_it, clip(w_it) A_it),  w_it = exp(new_t - old_t).

    Args:
        shard: with ``old_logprobs_T``; ``advantages_T`` (a critic's, or any others) and ``weights_S`` are used.
        new_logprobs_T: [T_local] float32 or float64, differentiable.
        clip_low, clip_high: the clip range of a token's ratio.
        sequence_sum: sums over each sequence's tokens on all ranks; its backward is the identity on [S].
    """
    log_ratio_T, log_ratio_S = log_ratios(shard, new_logprobs_T, sequence_sum)
    return token_loss(
        shard,
        log_ratio_T,
        log_ratio_T=log_ratio_T,
        log_ratio_S=log_ratio_S,
        clip_low=clip_low,
        clip_high=clip_high,
        sequence_sum=sequence_sum,
    )
