"""Group Relative Policy Optimization, arXiv 2402.03300, as arXiv 2507.18071 eq. 2 states it."""

from __future__ import annotations

import torch

from megatron_gspo.algorithm.losses.ppo import ppo
from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


def grpo(
    shard: TokenShard,
    new_logprobs_T: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    sequence_sum: SequenceSum,
) -> LossOutput:
    """PPO's clipped objective with group-relative advantages in place of a critic's.

    -sum_i weight_i / |y_i| sum_t min(w_it A_it, clip(w_it) A_it),  w_it = exp(new_t - old_t),  A_it = A_i

    What sets it apart from PPO is in ``advantages_T``, so the arithmetic is PPO's; arguments and result too.
    """
    return ppo(shard, new_logprobs_T, clip_low=clip_low, clip_high=clip_high, sequence_sum=sequence_sum)
