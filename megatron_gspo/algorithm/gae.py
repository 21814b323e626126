"""Generalised advantage estimation over trained tokens, and the loss of the values that it takes.

The tokens of an environment between two trained ones are no actions: the chain goes from a trained token to the next
one, whose value is that of the state that it was drawn in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from megatron_gspo.algorithm.surrogate import token_weights, trained
from megatron_gspo.types import SequenceSum, TokenShard


def generalised_advantages(
    rewards_T: torch.Tensor,
    values_T: torch.Tensor,
    mask_T: torch.Tensor,
    sequence_T: torch.Tensor,
    *,
    gamma: float,
    lam_S: torch.Tensor,
) -> torch.Tensor:
    """A_t = sum_k (gamma lambda)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t (arXiv 1506.02438, eq. 16).

    The value behind a response's last token is 0: an episode ends there, also where a limit cut it.

    >>> one = torch.ones(2, dtype=torch.float64)
    >>> generalised_advantages(torch.tensor([0.0, 1.0]), 0.5 * one, one.bool(), torch.tensor([0, 0]),
    ...                        gamma=1.0, lam_S=one[:1]).tolist()
    [0.5, 0.5]

    Args:
        rewards_T, values_T: [T] of a whole micro-batch, in its order; read where the mask is True.
        mask_T: [T] bool, positions that predict a trained token.
        sequence_T: [T], the sequence in [0, S] of each.
        lam_S: [S] lambda of each sequence.
    Returns:
        [T] float64; 0 where the mask is False.
    """
    places = mask_T.nonzero()[:, 0]
    row = sequence_T[places]
    counts_S = torch.bincount(row, minlength=len(lam_S))
    column = torch.arange(len(places), device=row.device) - (counts_S.cumsum(0) - counts_S)[row]
    width = int(counts_S.max()) if len(places) else 0
    rewards_SR, values_SR = torch.zeros(2, len(lam_S), width + 1, dtype=torch.float64, device=row.device)
    rewards_SR[row, column], values_SR[row, column] = rewards_T[places].double(), values_T[places].double()
    delta_SR = rewards_SR[:, :-1] + gamma * values_SR[:, 1:] - values_SR[:, :-1]
    decay_S, running_S = gamma * lam_S.double(), lam_S.new_zeros(len(lam_S), dtype=torch.float64)
    advantages_SR = torch.empty_like(delta_SR)
    for step in reversed(range(width)):  # behind a shorter sequence's end all is 0
        running_S = delta_SR[:, step] + decay_S * running_S
        advantages_SR[:, step] = running_S
    advantages_T = torch.zeros(mask_T.shape, dtype=torch.float64, device=mask_T.device)
    advantages_T[places] = advantages_SR[row, column]
    return advantages_T


def lambdas(lengths_S: torch.Tensor, lam: float, alpha: float | None) -> torch.Tensor:
    """[S] float64: ``lam``, or 1 - 1 / (alpha l) of a response of l tokens, at least 0 (arXiv 2504.05118, eq. 8)."""
    lengths_S = lengths_S.double()
    if alpha is None:
        return torch.full_like(lengths_S, lam)
    return (1 - 1 / (alpha * lengths_S.clamp(min=1))).clamp(min=0)


class ValueOutput(NamedTuple):
    """What the value loss gives for one micro-batch."""

    loss: torch.Tensor
    """Scalar to differentiate: this micro-batch's part of the mini-batch's mean."""
    clipped_T: torch.Tensor
    """[T_local] bool: trained tokens whose clipped error is the larger one, which stops their gradient."""


def value_loss(shard: TokenShard, values_T: torch.Tensor, clip: float | None, sequence_sum: SequenceSum) -> ValueOutput:
    """sum_i weight_i / |y_i| sum_t max((V - R)^2, (V_old + clip(V - V_old) - R)^2) / 2, with the policy's weights.

    The clipped form is that of OpenAI's baselines for arXiv 1707.06347; without ``clip`` it is the squared error.

    Args:
        shard: with ``values_T`` (V_old) and ``returns_T`` (R).
        values_T: [T_local] V, differentiable, float32 or float64.
    """
    values_T, old_T, returns_T = (trained(shard, each) for each in (values_T, shard.values_T, shard.returns_T))
    errors_T = (values_T - returns_T).square()
    clipped_T = torch.zeros_like(shard.mask_T)
    if clip is not None:
        moved_T = values_T - old_T
        bounded_T = (old_T + moved_T.clamp(-clip, clip) - returns_T).square()
        clipped_T = (moved_T.abs() > clip) & (bounded_T > errors_T)
        errors_T = torch.maximum(errors_T, bounded_T)
    terms_T = 0.5 * token_weights(shard) * errors_T
    return ValueOutput(sequence_sum(terms_T, shard.sequence_T, shard.num_sequences).sum(), clipped_T)


@dataclass
class ValueScale:
    """Values are mean + std x what the head gives: running moments of returns (arXiv 2103.01955, section 5.1).

    >>> scale = ValueScale()
    >>> scale.update(mean=2.0, square=5.0)
    >>> scale.mean, scale.std
    (2.0, 1.0)
    """

    first: float = 0.0
    second: float = 0.0
    weight: float = 0.0
    """Of what has been seen, below 1: the sums begin at 0, and are divided by it."""

    DECAY: ClassVar = 0.99
    """An outer step."""
    SMALLEST: ClassVar = 1e-2
    """Of a standard deviation: returns of one value would be divided by nothing."""

    @property
    def mean(self) -> float:
        """Of returns so far; 0 before any."""
        return self.first / self.weight if self.weight else 0.0

    @property
    def std(self) -> float:
        """Of returns so far; 1 before any."""
        if not self.weight:
            return 1.0
        return max(self.second / self.weight - self.mean**2, self.SMALLEST**2) ** 0.5

    def update(self, mean: float, square: float) -> None:
        """Takes in an outer step's mean return, and mean squared return."""
        self.first = self.DECAY * self.first + (1 - self.DECAY) * mean
        self.second = self.DECAY * self.second + (1 - self.DECAY) * square
        self.weight = self.DECAY * self.weight + (1 - self.DECAY)
