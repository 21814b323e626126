"""Supervised fine-tuning: the mean negative log-likelihood of the completions' tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.base import Algorithm

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Sft(Algorithm):
    """-sum_i weight_i / |y_i| sum_t log pi(y_it), with the weights of "token-mean": the mean over all target tokens."""

    source: ClassVar = "maximum likelihood"
    draws_responses: ClassVar = False

    name: Literal["sft"] = "sft"

    @property
    def uses_reference(self) -> bool:
        """Never."""
        return False

    @property
    def uses_critic(self) -> bool:
        """Never."""
        return False

    @property
    def weighting(self) -> str:
        return "token-mean"

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.surrogate import likelihood_loss

        return likelihood_loss(shard, new_logprobs_T, sequence_sum)
