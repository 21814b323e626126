"""Estimates of the KL divergence between policies, from single samples (Schulman, "Approximating KL divergence").

With x drawn from p, log r = log q(x) - log p(x), KL(p || q) = E_p[-log r]:

    k1 = -log r                 unbiased; each sample of either sign
    k3 = r - 1 - log r          unbiased and never negative; expm1(log r) - log r, since r is near 1
"""

from __future__ import annotations

import numpy as np
import torch

from megatron_gspo.algorithm.losses.surrogate import token_weights
from megatron_gspo.algorithm.ratios import masked_log_ratio
from megatron_gspo.errors import BatchError
from megatron_gspo.types import SequenceSum, TokenShard


def k1(log_r: torch.Tensor) -> torch.Tensor:
    """-log r for log r = log q - log p at samples of p: an estimate of KL(p || q), elementwise."""
    return -log_r


def k3(log_r: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r for log r = log q - log p at samples of p: an estimate of KL(p || q), elementwise, >= 0."""
    return torch.expm1(log_r) - log_r


def kl_loss(shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> torch.Tensor:
    """weight_i / |y_i| sum_t w_it k3_it for KL(new || ref): [T_local] -> [S], complete on every rank.

    The tokens were drawn from the old policy, so k3 carries w_it = new / old, through which the gradient flows too:
    only then is the gradient of the estimate an estimate of the gradient (DeepSeek-V3.2, arXiv 2512.02556).

    Raises BatchError without ``old_logprobs_T`` or ``ref_logprobs_T``.
    """
    if shard.old_logprobs_T is None or shard.ref_logprobs_T is None:
        missing = "old" if shard.old_logprobs_T is None else "reference"
        raise BatchError(f"the batch has no {missing} logprobs: a KL loss needs the passes of pi_old and the reference")
    w_T = masked_log_ratio(new_logprobs_T, shard.old_logprobs_T, shard.mask_T).exp()
    log_r_T = -masked_log_ratio(new_logprobs_T, shard.ref_logprobs_T, shard.mask_T)
    return sequence_sum(token_weights(shard) * w_T * k3(log_r_T), shard.sequence_T, shard.num_sequences)


def k1_reward_penalty(rollout_logprobs_R: np.ndarray, ref_logprobs_R: np.ndarray, coef: float) -> float:
    """coef * sum_t (log mu_t - log ref_t): what a response's reward loses for straying from the reference.

    The k1 estimate of KL(rollout || reference) over whole responses. It shapes rewards only: as a loss its gradient
    is that of log pi, which has mean zero.

    Args:
        rollout_logprobs_R, ref_logprobs_R: [R], the response's tokens under the engine and under the reference.
    """
    rollout, ref = np.asarray(rollout_logprobs_R, np.float64), np.asarray(ref_logprobs_R, np.float64)
    if rollout.shape != ref.shape:
        raise BatchError(f"{rollout.shape} rollout logprobs do not match {ref.shape} reference logprobs")
    return float(coef * np.sum(rollout - ref))
