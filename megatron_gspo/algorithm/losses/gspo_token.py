"""GSPO-token, arXiv 2507.18071, eq. 13: GSPO with an advantage for each token."""

from __future__ import annotations

import torch

from megatron_gspo.algorithm.losses.surrogate import log_ratios, token_loss
from megatron_gspo.algorithm.ratios import expand
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


def gspo_token(
    shard: TokenShard,
    new_logprobs_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """-sum_i weight_i / |y_i| sum_t min(s_it A_it, clip(s_it) A_it),  s_it = sg[s_i] pi_t / sg[pi_t].

    s_it has the value of s_i (pi / sg[pi] is exactly 1) and the gradient of the token's own log-probability. With
    A_it = A_i it equals GSPO in value, clip decisions and gradient.

    Args:
        shard: with ``old_logprobs_T``; ``advantages_T`` and ``weights_S`` are used.
        new_logprobs_T: [T_local] float32 or float64, differentiable.
        clip_low, clip_high: the clip range of s_it, which is that of s_i.
        sequence_sum: sums over each sequence's tokens on all ranks; its backward is the identity on [S].
    """
    log_ratio_T, log_ratio_S = log_ratios(shard, new_logprobs_T, sequence_sum)
    straight_through_T = log_ratio_T - log_ratio_T.detach()  # 0 in value; the token's own gradient
    return token_loss(
        shard,
        expand(log_ratio_S.detach(), shard.sequence_T) + straight_through_T,
        log_ratio_T=log_ratio_T,
        log_ratio_S=log_ratio_S,
        clip_low=clip_low,
        clip_high=clip_high,
        sequence_sum=sequence_sum,
    )
