"""Group Sequence Policy Optimization, arXiv 2507.18071, eq. 5."""

from __future__ import annotations

import torch

from megatron_gspo.algorithm.losses.surrogate import clipped_surrogate, log_ratios
from megatron_gspo.algorithm.ratios import expand
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


def gspo(
    shard: TokenShard,
    new_logprobs_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """-sum_i weight_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i),  s_i = exp(mean_t(new_t - old_t)).

    The ratio is of the whole response, normalised by its length; a response is clipped as one. Without clipping its
    gradient is weight_i s_i A_i / |y_i| for each of its tokens.

    Args:
        shard: with ``old_logprobs_T``; ``advantages_S`` and ``weights_S`` are used.
        new_logprobs_T: [T_local] float32 or float64, differentiable.
        clip_low, clip_high: the clip range of s_i.
        sequence_sum: sums over each sequence's tokens on all ranks; its backward is the identity on [S].
    """
    log_ratio_T, log_ratio_S = log_ratios(shard, new_logprobs_T, sequence_sum)
    terms_S, low_S, high_S = clipped_surrogate(log_ratio_S, shard.advantages_S, clip_low, clip_high)
    loss_S = -shard.weights_S * terms_S
    return LossOutput(
        loss=loss_S.sum(),
        loss_S=loss_S.detach(),
        log_ratio_S=log_ratio_S.detach(),
        log_ratio_T=log_ratio_T.detach(),
        clipped_low_T=expand(low_S, shard.sequence_T) & shard.mask_T,
        clipped_high_T=expand(high_S, shard.sequence_T) & shard.mask_T,
        clipped_S=low_S | high_S,
    )
