"""Sums over the tokens of a sequence that are spread over ranks: what makes s_i right under tensor and context
parallelism.

Each tensor and context rank stores per-token tensors (logprobs, old logprobs, masks) for its own share of a
micro-batch's tokens (``types.Shard``), and a sequence may lie on several; under context parallelism it lies on all of
them. With x_t a value of token t and R_r the tokens of rank r,

    forward     X_i = sum_r sum_{t in R_r, t in i} x_t        partial sums [S] on each rank, all-reduced over r
    backward    dL/dx_t = dL/dX_i                             for the rank's own t in i: the identity from [S] to tokens

The backward needs no collective: every rank computes the same loss L from the same X, so dL/dX is on every rank
already, and each x_t enters X with coefficient 1. (Summing dL/dX over ranks would count one loss n times.) The other
half of the mathematics is where a token's gradient has to go: to every vocabulary shard (``logprobs``), and to the keys
and values of other context ranks (``context``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_gspo.algorithm.ratios import segment_sum


@dataclass(frozen=True)
class ShardedSequenceSum:
    """The ``SequenceSum`` of a rank whose tokens are one share of the micro-batch."""

    group: dist.ProcessGroup
    """The ranks among which a sequence's tokens are spread."""

    def __call__(self, values_T: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int) -> torch.Tensor:
        """[..., T_local] -> [..., S], complete on every rank of the group."""
        return _AllReduceSum.apply(segment_sum(values_T, sequence_T, num_sequences), self.group)


class _AllReduceSum(torch.autograd.Function):
    """All-reduce forward, identity backward: for a sum from which every rank computes the same loss."""

    @staticmethod
    def forward(ctx: Any, partial: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        if group.size() == 1:
            return partial.clone()
        total = partial.detach().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
