"""What the policy losses share: ratios, the clipped surrogate, and the sum of a token's terms over its sequence."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from megatron_gspo.algorithm.ratios import expand, masked_log_ratio, sequence_log_ratio
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard

LARGE_LOG_RATIO = 20.0
"""A ratio above its exponential, 5e8, is far beyond whatever a smooth weight lets through, and its square overflows no
float32."""


class Ratios(NamedTuple):
    """Between pi_theta and pi_old, in log space."""

    of_tokens_T: torch.Tensor
    """[T_local] log w_t = new - old; 0 where the mask is False."""
    of_responses_S: torch.Tensor
    """[S] log s_i, its mean over the response; complete on every rank."""


def log_ratios(shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> Ratios:
    """Both differentiable in ``new_logprobs_T`` [T_local]."""
    of_tokens_T = masked_log_ratio(new_logprobs_T, shard.old_logprobs_T, shard.mask_T)
    of_responses_S = sequence_log_ratio(of_tokens_T, shard.mask_T, shard.sequence_T, shard.num_sequences, sequence_sum)
    return Ratios(of_tokens_T, of_responses_S)


def clipped_surrogate(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) for r = exp(log_ratio), elementwise.

    The clipped branch is the smaller one where r is below the range and A < 0, or above it and A > 0; elsewhere the
    term is r A. The log-ratio is clipped before ``exp``, so a term on the clipped branch cannot overflow and its
    gradient is exactly 0; where A is 0 the ratio is not looked at.

    ``dual_clip`` c > 1 + clip_high bounds the term below by c A where A < 0 (arXiv 1912.09729, eq. 6): a ratio above c
    is clipped there too.

    Returns:
        (terms, clipped_low, clipped_high), of the shape of ``log_ratio``; the last two are bool.
    """
    floor, ceiling = log_range(clip_low, clip_high)
    clipped_low = (log_ratio < floor) & (advantages < 0)
    clipped_high = (log_ratio > ceiling) & (advantages > 0)
    bounded = log_ratio.masked_fill(clipped_low, floor).masked_fill(clipped_high, ceiling)
    if dual_clip is not None:
        clipped_twice = (log_ratio > math.log(dual_clip)) & (advantages < 0)
        bounded = bounded.masked_fill(clipped_twice, math.log(dual_clip))
        clipped_high = clipped_high | clipped_twice
    ratio = bounded.masked_fill(advantages == 0, 0.0).exp()
    return ratio * advantages, clipped_low, clipped_high


def log_range(clip_low: float, clip_high: float) -> tuple[float, float]:
    """The ends of [1 - clip_low, 1 + clip_high] in the log; minus infinity for a clip_low of 1."""
    return math.log1p(-clip_low) if clip_low < 1 else -math.inf, math.log1p(clip_high)


def trained(shard: TokenShard, values_T: torch.Tensor) -> torch.Tensor:
    """[T_local] values of trained tokens; 0 where the mask is False, whatever stands there."""
    return torch.where(shard.mask_T, values_T, 0.0)


def trained_advantages(shard: TokenShard) -> torch.Tensor:
    """[T_local] A_t; 0 where the mask is False."""
    return trained(shard, shard.advantages_T)


def choose(condition_T: torch.Tensor, this: float, other: float, like: torch.Tensor) -> torch.Tensor:
    """``this`` where the condition holds, else ``other``, in the dtype of ``like`` (``torch.where`` of two numbers
    would round both to float32)."""
    return torch.where(condition_T, like.new_tensor(this), like.new_tensor(other))


def token_weights(shard: TokenShard) -> torch.Tensor:
    """weight / |y| of each token's sequence, of prompt tokens too; 0 in padding: [T_local]."""
    return expand(shard.weights_S / shard.lengths_S.clamp(min=1), shard.sequence_T)


def response_weights(shard: TokenShard) -> torch.Tensor:
    """[S] weight of a loss with one term for each response: where tokens are corrected, times their mean correction."""
    return shard.weights_S * shard.corrections_S if TokenShard.corrections_S in shard else shard.weights_S


def token_loss(
    shard: TokenShard,
    terms_T: torch.Tensor,
    low_T: torch.Tensor,
    high_T: torch.Tensor,
    ratios: Ratios,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """-sum_t weight / |y| terms_t, summed by sequence; the terms and the clip counts share one ``sequence_sum``.

    Args:
        terms_T: [T_local] what each token adds to the objective; 0 where the mask is False.
        low_T, high_T: [T_local] bool, tokens on the clipped branch below and above the range.
        ratios: only reported.
    """
    terms_T = -token_weights(shard) * terms_T
    if TokenShard.corrections_T in shard:
        terms_T = terms_T * shard.corrections_T
    stacked_T = torch.stack([terms_T, (low_T | high_T).to(terms_T.dtype)])
    loss_S, clipped_S = sequence_sum(stacked_T, shard.sequence_T, shard.num_sequences)
    return _output(loss_S, ratios, low_T, high_T, clipped_S.detach() > 0)


def response_loss(
    shard: TokenShard, terms_S: torch.Tensor, low_S: torch.Tensor, high_S: torch.Tensor, ratios: Ratios
) -> LossOutput:
    """-sum_i weight_i terms_i, of a loss with one term for each response: [S], like its clip decisions."""
    loss_S = -response_weights(shard) * terms_S
    low_T, high_T = (expand(clipped_S, shard.sequence_T) & shard.mask_T for clipped_S in (low_S, high_S))
    return _output(loss_S, ratios, low_T, high_T, low_S | high_S)


def geometric_loss(
    shard: TokenShard,
    log_terms_T: torch.Tensor,
    low_T: torch.Tensor,
    high_T: torch.Tensor,
    ratios: Ratios,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """-sum_i weight_i exp(mean_t log_terms_t) A_i; the mean and the clip counts share one ``sequence_sum``.

    Arguments are those of ``token_loss``; ``log_terms_T`` is 0 where the mask is False. Where A is 0 the terms are not
    looked at.
    """
    stacked_T = torch.stack([log_terms_T, (low_T | high_T).to(log_terms_T.dtype)])
    sums_S, clipped_S = sequence_sum(stacked_T, shard.sequence_T, shard.num_sequences)
    mean_S = (sums_S / shard.lengths_S.clamp(min=1)).masked_fill(shard.advantages_S == 0, 0.0)
    loss_S = -response_weights(shard) * mean_S.exp() * shard.advantages_S
    return _output(loss_S, ratios, low_T, high_T, clipped_S.detach() > 0)


def likelihood_loss(shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
    """-sum_t weight / |y| log pi(y_t), summed by sequence; without an old policy, every ratio is 1."""
    logprobs_T = trained(shard, new_logprobs_T)
    loss_S = sequence_sum(-token_weights(shard) * logprobs_T, shard.sequence_T, shard.num_sequences)
    nothing_T, nothing_S = torch.zeros_like(shard.mask_T), torch.zeros_like(shard.weights_S, dtype=torch.bool)
    ones = Ratios(torch.zeros_like(logprobs_T), torch.zeros_like(loss_S))
    return _output(loss_S, ones, nothing_T, nothing_T, nothing_S)


def _output(
    loss_S: torch.Tensor, ratios: Ratios, low_T: torch.Tensor, high_T: torch.Tensor, clipped_S: torch.Tensor
) -> LossOutput:
    return LossOutput(
        loss=loss_S.sum(),
        loss_S=loss_S.detach(),
        log_ratio_S=ratios.of_responses_S.detach(),
        log_ratio_T=ratios.of_tokens_T.detach(),
        clipped_low_T=low_T,
        clipped_high_T=high_T,
        clipped_S=clipped_S,
    )
