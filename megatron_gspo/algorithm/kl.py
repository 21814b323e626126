"""The KL divergence to a reference policy, estimated from single samples (Schulman, "Approximating KL divergence").

With x drawn from p and log r = log q(x) - log p(x), k3 = r - 1 - log r estimates KL(p || q) without bias and is never
negative; r is near 1, so it is formed as expm1(log r) - log r. (The simpler k1 = -log r has a useless gradient.)
"""

from __future__ import annotations

import torch

from megatron_gspo.algorithm.ratios import masked_log_ratio
from megatron_gspo.algorithm.surrogate import token_weights
from megatron_gspo.types import SequenceSum, TokenShard


def k3(log_r: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r for log r = log q - log p at samples of p: an estimate of KL(p || q), elementwise, >= 0."""
    return torch.expm1(log_r) - log_r


def kl_loss(shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> torch.Tensor:
    """weight_i / |y_i| sum_t w_it k3_it for KL(new || ref): [T_local] -> [S], complete on every rank.

    The tokens were drawn from the old policy, so k3 carries w_it = new / old, through which the gradient flows too:
    only then is the gradient of the estimate an estimate of the gradient (DeepSeek-V3.2, arXiv 2512.02556).

    Raises BatchError without ``old_logprobs_T`` or ``ref_logprobs_T``.
    """
    w_T = masked_log_ratio(new_logprobs_T, shard.old_logprobs_T, shard.mask_T).exp()
    log_r_T = -masked_log_ratio(new_logprobs_T, shard.ref_logprobs_T, shard.mask_T)
    return sequence_sum(token_weights(shard) * w_T * k3(log_r_T), shard.sequence_T, shard.num_sequences)
