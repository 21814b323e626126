"""Clip-Cov and KL-Cov (arXiv 2505.22617): the few tokens that lower the entropy most are left out, or held back.

A token's covariance is (log pi_old - its mean) (A - its mean), over the trained tokens of the mini-batch. The paper
writes it under the current policy, and implementations take means over a micro-batch; here it is of the policy that
drew the mini-batch and of the whole of it, so that no layout or packing changes which tokens are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from megatron_gspo.algorithm.base import Algorithm, Totals
from megatron_gspo.section import PositiveFloat

if TYPE_CHECKING:
    import torch

    from megatron_gspo.types import LossOutput, SequenceSum, TokenShard

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class Covariance(Algorithm):
    """-sum_i weight_i / |y_i| sum_t term_t, with w_it A_it as the term of most tokens; subclasses say what is of the
    chosen ones."""

    share: Share = 2e-4
    """Part of a mini-batch's tokens that is chosen; one at least."""

    def prepare(self, shards: Sequence[TokenShard], totals: Totals) -> list[TokenShard]:
        """Marks the chosen tokens of a mini-batch, in ``chosen_T``."""
        import torch

        covariances = covariances_of(shards, totals)
        if not covariances:
            return []
        tokens = totals.sum(torch.tensor([sum(own.numel() for own in covariances)], dtype=torch.float64))
        ranks = [self.rank(shard, own) for shard, own in zip(shards, covariances, strict=True)]
        limit = totals.nth_largest(torch.cat(ranks), max(int(self.share * float(tokens)), 1))
        return [
            shard.replace(chosen_T=_at_trained(shard, (rank >= limit) & torch.isfinite(rank)))
            for shard, rank in zip(shards, ranks, strict=True)
        ]

    def rank(self, shard: TokenShard, covariances: torch.Tensor) -> torch.Tensor:
        """[trained tokens] float64: those with the largest are chosen; minus infinity never."""
        raise NotImplementedError


class ClipCov(Covariance):
    """Of the tokens whose covariance lies in (low, high), a random share adds nothing."""

    source: ClassVar = "arXiv 2505.22617, eq. 9 to 11"

    name: Literal["clip-cov"] = "clip-cov"
    low: PositiveFloat = 1.0
    """Covariance above which a token may be chosen."""
    high: PositiveFloat = 5.0
    """Covariance below which it may."""

    def rank(self, shard: TokenShard, covariances: torch.Tensor) -> torch.Tensor:
        """A drawn number inside the band, minus infinity outside."""
        inside = (covariances > self.low) & (covariances < self.high)
        return drawn_numbers(shard).masked_fill(~inside, -float("inf"))

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        from megatron_gspo.algorithm.surrogate import log_ratios, token_loss, trained_advantages

        ratios, advantages_T = log_ratios(shard, new_logprobs_T, sequence_sum), trained_advantages(shard)
        terms_T = (ratios.of_tokens_T.exp() * advantages_T).masked_fill(shard.chosen_T, 0.0)
        low_T, high_T = shard.chosen_T & (advantages_T < 0), shard.chosen_T & (advantages_T > 0)
        return token_loss(shard, terms_T, low_T, high_T, ratios, sequence_sum)


class KlCov(Covariance):
    """The share of tokens with the largest covariance pays coefficient x |log w|."""

    source: ClassVar = "arXiv 2505.22617, eq. 12 and 13"

    name: Literal["kl-cov"] = "kl-cov"
    coefficient: PositiveFloat = 1.0
    """Weight of |log w_t|."""

    def rank(self, shard: TokenShard, covariances: torch.Tensor) -> torch.Tensor:
        """The covariance."""
        return covariances

    def loss(self, shard: TokenShard, new_logprobs_T: torch.Tensor, sequence_sum: SequenceSum) -> LossOutput:
        import torch

        from megatron_gspo.algorithm.surrogate import log_ratios, token_loss, trained_advantages

        ratios, advantages_T = log_ratios(shard, new_logprobs_T, sequence_sum), trained_advantages(shard)
        held_T = torch.where(shard.chosen_T, ratios.of_tokens_T.abs(), 0.0)
        terms_T = ratios.of_tokens_T.exp() * advantages_T - self.coefficient * held_T
        nothing_T = torch.zeros_like(shard.mask_T)
        return token_loss(shard, terms_T, nothing_T, nothing_T, ratios, sequence_sum)


def covariances_of(shards: Sequence[TokenShard], totals: Totals) -> list[torch.Tensor]:
    """By micro-batch, [trained tokens of this rank] float64."""
    import torch

    columns = [
        torch.stack([shard.old_logprobs_T[shard.mask_T].double(), shard.advantages_T[shard.mask_T].double()])
        for shard in shards
    ]
    if not columns:
        return []
    sums = torch.stack([torch.cat([own.sum(dim=1), own.new_tensor([own.shape[1]])]) for own in columns]).sum(dim=0)
    logprob, advantage, count = totals.sum(sums).tolist()
    n = max(count, 1.0)
    return [(own[0] - logprob / n) * (own[1] - advantage / n) for own in columns]


def drawn_numbers(shard: TokenShard) -> torch.Tensor:
    """[trained tokens] float64 in [0, 1): a hash (splitmix64) of response and place, the same in any layout."""
    import torch

    keys = torch.tensor([(g * 1_000_003 + s) & (2**62 - 1) for g, s in shard.samples] + [0], device=shard.mask_T.device)
    bits = keys[shard.sequence_T[shard.mask_T]] * 1_000_033 + shard.places_T[shard.mask_T]
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return ((bits ^ ((bits >> 31) & ((1 << 33) - 1))) >> 11 & ((1 << 53) - 1)).double() / 2**53


def _at_trained(shard: TokenShard, values: torch.Tensor) -> torch.Tensor:
    """[T_local] bool of values of trained tokens; False elsewhere."""
    import torch

    chosen_T = torch.zeros_like(shard.mask_T)
    chosen_T[shard.mask_T] = values
    return chosen_T
