"""What a loss takes besides its columns, and what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""By ``model.dtype``."""


class SequenceSum(Protocol):
    """Sums per-token tensors over each sequence: [..., T_local] -> [..., S], complete on every rank.

    Leading dimensions are summed independently, so that several sums share one call (and one collective).

    The single-process form is ``algorithm.ratios.segment_sum``; the sharded one, with the mathematics of its
    backward, is ``parallel.sequence.ShardedSequenceSum``.
    """

    def __call__(self, values_T: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class LossOutput:
    """What a policy loss returns for one micro-batch."""

    loss: torch.Tensor
    """Scalar to differentiate: this micro-batch's part of the globally normalised sum."""
    loss_S: torch.Tensor
    """[S] detached: each sequence's part of ``loss``, complete on every rank."""
    log_ratio_S: torch.Tensor
    """[S] detached: log s_i, the length-normalised sequence log-ratio (for every loss, whether it uses it or not)."""
    log_ratio_T: torch.Tensor
    """[T_local] detached: log w_t = new - old; 0 where the mask is False."""
    clipped_low_T: torch.Tensor
    """[T_local] bool: response tokens on the clipped branch with the ratio below 1 - clip_low."""
    clipped_high_T: torch.Tensor
    """[T_local] bool: response tokens on the clipped branch with the ratio above 1 + clip_high."""
    clipped_S: torch.Tensor
    """[S] bool: the sequence has a token on the clipped branch, on whichever rank."""


class Trained(NamedTuple):
    """What a micro-batch gave in training."""

    new_logprobs_T: torch.Tensor
    """[T_local] detached."""
    entropy_T: torch.Tensor
    """[T_local] detached, nats."""
    output: LossOutput
