"""Supervised fine-tuning: the weighted negative log-likelihood of the response tokens."""

from __future__ import annotations

import torch

from megatron_gspo.algorithm.losses.surrogate import token_weights
from megatron_gspo.types import SequenceSum, TokenShard


def sft_loss(shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> torch.Tensor:
    """-weight_i / |y_i| sum_t log pi(y_it): [T_local] -> [S], complete on every rank; differentiate its sum.

    Weights are those of ``response_weights``: "token-mean" gives the usual mean over all target tokens.
    """
    logprobs_T = torch.where(shard.mask_T, new_logprobs_T, 0.0)
    return sequence_sum(-token_weights(shard) * logprobs_T, shard.sequence_T, shard.num_sequences)
