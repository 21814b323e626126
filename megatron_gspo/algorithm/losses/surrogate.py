"""What the policy losses share: the clipped surrogate, and the sum of a token's terms over its sequence."""

from __future__ import annotations

import math

import torch

from megatron_gspo.algorithm.ratios import expand, masked_log_ratio, sequence_log_ratio
from megatron_gspo.errors import BatchError
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


def log_ratios(
    shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log w_t [T_local], log s_i [S]), both differentiable in ``new_logprobs_T``."""
    if shard.old_logprobs_T is None:
        raise BatchError("the batch has no old logprobs: run the pi_old pass before the loss")
    log_ratio_T = masked_log_ratio(new_logprobs_T, shard.old_logprobs_T, shard.mask_T)
    log_ratio_S = sequence_log_ratio(log_ratio_T, shard.mask_T, shard.sequence_T, shard.num_sequences, sequence_sum)
    return log_ratio_T, log_ratio_S


def clipped_surrogate(
    log_ratio: torch.Tensor, advantages: torch.Tensor, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) for r = exp(log_ratio), elementwise.

    The clipped branch is the smaller one where r is below the range and A < 0, or above it and A > 0; elsewhere the
    term is r A. The log-ratio is clipped before ``exp``, so a term on the clipped branch cannot overflow and its
    gradient is exactly 0; where A is 0 the ratio is not looked at.

    Returns:
        (terms, clipped_low, clipped_high), of the shape of ``log_ratio``; the last two are bool.
    """
    floor, ceiling = math.log1p(-clip_low), math.log1p(clip_high)
    clipped_low = (log_ratio < floor) & (advantages < 0)
    clipped_high = (log_ratio > ceiling) & (advantages > 0)
    bounded = log_ratio.masked_fill(clipped_low, floor).masked_fill(clipped_high, ceiling)
    ratio = bounded.masked_fill(advantages == 0, 0.0).exp()
    return ratio * advantages, clipped_low, clipped_high


def token_weights(shard: TokenShard) -> torch.Tensor:
    """weight / |y| of each token's sequence, prompt tokens alike; 0 in padding: [T_local]."""
    return expand(shard.weights_S / shard.lengths_S.clamp(min=1), shard.sequence_T)


def token_loss(
    shard: TokenShard,
    clipping_log_ratio_T: torch.Tensor,
    *,
    log_ratio_T: torch.Tensor,
    log_ratio_S: torch.Tensor,
    clip_low: float,
    clip_high: float,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """-sum_t weight / |y| min(r_t A_t, clip(r_t) A_t) with r_t = exp(clipping_log_ratio_T), summed by sequence.

    ``log_ratio_T`` and ``log_ratio_S`` are only reported. The terms and the clip counts share one ``sequence_sum``.
    """
    advantages_T = torch.where(shard.mask_T, shard.advantages_T, 0.0)
    terms_T, low_T, high_T = clipped_surrogate(clipping_log_ratio_T, advantages_T, clip_low, clip_high)
    terms_T = -token_weights(shard) * terms_T
    stacked_T = torch.stack([terms_T, (low_T | high_T).to(terms_T.dtype)])
    loss_S, clipped_S = sequence_sum(stacked_T, shard.sequence_T, shard.num_sequences)
    return LossOutput(
        loss=loss_S.sum(),
        loss_S=loss_S.detach(),
        log_ratio_S=log_ratio_S.detach(),
        log_ratio_T=log_ratio_T.detach(),
        clipped_low_T=low_T,
        clipped_high_T=high_T,
        clipped_S=clipped_S.detach() > 0,
    )
