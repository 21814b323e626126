"""The clipped objective of Proximal Policy Optimization, arXiv 1707.06347, eq. 7, with supplied advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from megatron_gspo.algorithm.clipped import Below, Clipped
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard


class ClippedTokens(Clipped):
    """-sum_i weight_i / |y_i| sum_t min(w_it A_it, clip(w_it) A_it),  w_it = exp(new_t - old_t)."""

    clips: ClassVar = "tokens"

    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bounds the term below by dual_clip x A where A < 0; absent, there is no such bound. Others have 3."""

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.surrogate import clipped_surrogate, log_ratios, token_loss, trained_advantages

        ratios = log_ratios(shard, new_logprobs_T, sequence_sum)
        terms_T, low_T, high_T = clipped_surrogate(
            ratios.of_tokens_T, trained_advantages(shard), *self.clip_range(), self.dual_clip
        )
        return token_loss(shard, terms_T, low_T, high_T, ratios, sequence_sum)


class Ppo(ClippedTokens):
    """PPO's clipped objective with group-relative advantages, or any others that are supplied."""

    source: ClassVar = "arXiv 1707.06347, eq. 7"

    name: Literal["ppo"] = "ppo"
    clip_low: Below = 0.2
    clip_high: PositiveFloat = 0.2
