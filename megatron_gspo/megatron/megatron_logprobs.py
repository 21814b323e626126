"""Megatron's own way from hidden states to logprobs, for comparison: no run uses it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce


def megatron_logprobs(
    hidden_TH: torch.Tensor, weight_VH: torch.Tensor, labels_T: torch.Tensor, *, group: dist.ProcessGroup
) -> torch.Tensor:
    """[T] logprobs of the labels, the same on every tensor rank, with the micro-batch's logits made and kept.

    ``hidden_TH`` [T / n, H], ``weight_VH`` [V / n, H] and ``labels_T`` [T] are as in ``vocab_parallel_logprobs``; all
    V rows take part. ``group`` is the tensor group of Megatron's parallel state. Each rank's backward takes all T
    gradients.
    """
    logits_T1V = linear_with_grad_accumulation_and_async_allreduce(
        hidden_TH[:, None],
        weight_VH,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=group.size() > 1,
        tp_group=group,
    )
    return -vocab_parallel_cross_entropy(logits_T1V, labels_T[:, None])[:, 0]
