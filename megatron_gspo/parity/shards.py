"""The case's tokens by number, on the rank that stores them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_gspo.algorithm import packing
from megatron_gspo.parity.case import Case
from megatron_gspo.policy.groups import Groups, device
from megatron_gspo.policy.policy import Policy
from megatron_gspo.policy.replay import route_dtype
from megatron_gspo.types import PackedBatch, RouteShard, TokenShard


def pack(case: Case, indices: Sequence[int], groups: Groups) -> PackedBatch:
    """A micro-batch as this layout's ranks need it, on this rank's device; a dummy for no samples."""
    ranks = {"tensor": groups.tensor.size(), "context": groups.context.size()}
    if indices:
        batch = packing.pack([case.samples[i] for i in indices], loss_dtype=case.loss_dtype, **ranks)
    else:
        batch = packing.dummy_batch(case.loss_dtype, **ranks)
    tensors = {name: value.to(device()) for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors)  # type: ignore[arg-type]


def own_numbers(case: Case, batch: PackedBatch, groups: Groups) -> np.ndarray:
    """[T_local] int64: the number in the case of each token that this rank stores; -1 for padding.

    Worked out from lengths, and cut as the product cuts labels, which stand in for the numbers.
    """
    numbers_T = torch.full((batch.num_tokens,), -1, dtype=torch.int64, device=batch.tokens_T.device)
    for key, start in zip(batch.samples, batch.cu_seqlens.tolist(), strict=False):
        if key in case.index_of:
            index = case.index_of[key]
            length = case.samples[index].length
            first = int(case.starts[index])
            numbers_T[start : start + length] = torch.arange(first, first + length, device=numbers_T.device)
    return packing.shard_tokens(replace(batch, labels_T=numbers_T), groups.shard).labels_T.cpu().numpy()


def with_old_logprobs(case: Case, batch: PackedBatch, groups: Groups) -> TokenShard:
    """This rank's shard with the case's old logprobs; NaN wherever nothing may be read."""
    by_number = np.full(int(case.starts[-1]) + 1, np.nan)  # the last one answers for padding
    for index, old_R in enumerate(case.old):
        by_number[case.predicting(index)] = old_R
    shard = packing.shard_tokens(batch, groups.shard)
    old_T = torch.from_numpy(by_number[own_numbers(case, batch, groups)])
    return replace(shard, old_logprobs_T=old_T.to(shard.labels_T.device, case.loss_dtype))


def routes(case: Case, batch: PackedBatch, policy: Policy) -> RouteShard:
    """The case's routes of this rank's layers and tokens; padding and the last token of a response have none."""
    shape, layers = policy.shape, policy.replay.layers
    numbers = own_numbers(case, batch, policy.groups)
    rows = [case.routes(layer, shape.num_experts, shape.top_k)[numbers] for layer in layers]
    experts_LTK = torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, len(numbers), shape.top_k)
    return RouteShard(
        layers,
        experts_LTK.to(device(), route_dtype(shape.num_experts)),
        torch.from_numpy((numbers >= 0) & ~np.isin(numbers, case.starts[1:] - 1)).to(device()),
    )
