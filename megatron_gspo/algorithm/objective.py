"""The whole training objective of a micro-batch: an algorithm's loss, a KL term, and a check for finite numbers."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_gspo.algorithm.base import Algorithm
from megatron_gspo.algorithm.kl import kl_loss
from megatron_gspo.algorithm.surrogate import log_ratios
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


def objective(
    algorithm: Algorithm,
    shard: TokenShard,
    new_logprobs_T: torch.Tensor,
    sequence_sum: SequenceSum,
    opsm: float | None = None,
) -> LossOutput:
    """The algorithm's loss plus ``kl_loss_coef`` times the KL to the reference, which is not formed when that is 0.

    ``opsm``: as in ``correction.opsm``; other arguments are those of ``Algorithm.loss``.
    """
    if opsm is not None:
        shard = without_far_off(shard, new_logprobs_T, sequence_sum, opsm)
    output = algorithm.loss(shard, new_logprobs_T, sequence_sum)
    if not algorithm.uses_reference or algorithm.kl_loss_coef == 0:
        return output
    kl_S = algorithm.kl_loss_coef * kl_loss(shard, new_logprobs_T, sequence_sum)
    return replace(output, loss=output.loss + kl_S.sum(), loss_S=output.loss_S + kl_S.detach())


@torch.no_grad()
def without_far_off(
    shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum, above: float
) -> TokenShard:
    """Off-policy sequence masking, arXiv 2512.02556, eq. 9: weight 0 for responses with A < 0 whose mean
    log(pi_old / pi_theta) is above ``above``."""
    moved_S = -log_ratios(shard, new_logprobs_T, sequence_sum).of_responses_S
    far_S = (moved_S > above) & (shard.advantages_S < 0)
    return shard.replace(weights_S=shard.weights_S.masked_fill(far_S, 0.0))


def find_non_finite(values_T: torch.Tensor, mask_T: torch.Tensor, shard: TokenShard) -> tuple[int, int] | None:
    """(group, sample) of the first response with a NaN or an infinity at an unmasked position; None when all is well.

    Masked positions are not looked at. ``values_T`` and ``mask_T`` are [T_local].
    """
    bad_T = mask_T & ~torch.isfinite(values_T)
    if not bool(bad_T.any()):
        return None
    return shard.samples[int(shard.sequence_T[bad_T][0])]
