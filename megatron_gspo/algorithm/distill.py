"""On-policy distillation: the student's own responses, and the teacher's probability of each of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from megatron_gspo.algorithm.clipped import Below
from megatron_gspo.algorithm.ppo import ClippedTokens
from megatron_gspo.section import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class Distill(ClippedTokens):
    """PPO's clipped objective with A_t = log pi_teacher - log pi_old, plus reward_coef times the advantage of rewards.

    Its expected gradient at pi_old is that of the reverse KL of each token's distribution, given what comes before it;
    a token gets no credit for what it leads to. ``algorithm.reference`` is the teacher.
    """

    source: ClassVar = "arXiv 2306.13649, section 3, with lambda = 1 and the reverse KL"
    needs_reference: ClassVar = True

    name: Literal["distill"] = "distill"
    clip_low: Below = 0.2
    clip_high: PositiveFloat = 0.2
    reward_coef: NonNegativeFloat = 0.0
    """Weight of the advantages that rewards give; 0 learns from the teacher alone."""

    @property
    def uses_reference(self) -> bool:
        """Always: the teacher."""
        return True

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.surrogate import clipped_surrogate, log_ratios, token_loss, trained

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        advantages_T = trained(shard, shard.ref_logprobs_T - shard.old_logprobs_T)
        if self.reward_coef:
            advantages_T = advantages_T + self.reward_coef * trained(shard, shard.advantages_T)
        terms_T, low_T, high_T = clipped_surrogate(ratios.of_tokens_T, advantages_T, *self.clip_range(), self.dual_clip)
        return token_loss(shard, terms_T, low_T, high_T, ratios, sequence_sum)
