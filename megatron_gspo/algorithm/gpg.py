"""Group Policy Gradient, arXiv 2504.02546: REINFORCE with group-relative advantages, without a ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.base import Aggregation, Algorithm

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Gpg(Algorithm):
    """-sum_i weight_i / |y_i| sum_t A_it log pi_theta(y_it).

    Nothing bounds how far several mini-batches move the policy: ``train.minibatches = 1`` is on-policy.
    """

    source: ClassVar = "arXiv 2504.02546"

    name: Literal["gpg"] = "gpg"
    aggregation: Aggregation = "token-mean"

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        import torch

        from megatron_gspo.algorithm.surrogate import log_ratios, token_loss, trained, trained_advantages

        terms_T = trained_advantages(shard) * trained(shard, new_logprobs_T)
        nothing_T = torch.zeros_like(shard.mask_T)
        return token_loss(
            shard, terms_T, nothing_T, nothing_T, log_ratios(shard, new_logprobs_T, sequence_sum), sequence_sum
        )
