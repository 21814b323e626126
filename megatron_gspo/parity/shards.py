"""The case's tokens by number, on the rank that stores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_gspo.batching import packing
from megatron_gspo.config import RunConfig
from megatron_gspo.megatron.groups import Groups, device
from megatron_gspo.megatron.policy import Policy
from megatron_gspo.megatron.replay import route_dtype
from megatron_gspo.parity.case import Case
from megatron_gspo.train.batch import Minibatch, weights_of
from megatron_gspo.types import PackedBatch, RouteShape, RouteShard, Sample, TokenShard


def pack_alone(case: Case, index: int) -> PackedBatch:
    """One response as a micro-batch of one process, on its device."""
    return packing.pack([case.samples[index].placed(1.0)], loss_dtype=case.loss_dtype).to(device())


def own_numbers(case: Case, batch: PackedBatch, groups: Groups) -> np.ndarray:
    """[T_local] int64: the number in the case of each token that this rank stores; -1 for padding.

    Worked out from lengths, and cut as the product cuts labels, which stand in for the numbers.
    """
    numbers_T = torch.full((batch.num_tokens,), -1, dtype=torch.int64, device=batch.tokens_T.device)
    for key, start in zip(batch.samples, batch.cu_seqlens.tolist(), strict=False):
        if key in case.index_of:
            own = case.own(case.index_of[key])
            length = own.stop - own.start
            numbers_T[start : start + length] = torch.arange(own.start, own.stop, device=numbers_T.device)
    return packing.shard_tokens(batch.replace(labels_T=numbers_T), groups.shard).labels_T.cpu().numpy()


def with_old_logprobs(case: Case, batch: PackedBatch, shard: TokenShard, groups: Groups) -> TokenShard:
    """The shard of a micro-batch with the case's old logprobs; NaN wherever nothing may be read."""
    by_number = scattered(case, case.old, np.nan, extra=1)  # the last one answers for padding
    old_T = torch.from_numpy(by_number[own_numbers(case, batch, groups)])
    return shard.replace(old_logprobs_T=old_T.to(shard.labels_T.device, case.loss_dtype))


def weighed_as(case: Case, minibatch: Minibatch, number: int, config: RunConfig) -> list[TokenShard]:
    """The shards of the case's mini-batch ``number`` with the responses' weights that another algorithm gives them."""
    lengths = {case.keys[index]: case.samples[index].num_trained for index in case.minibatches[number]}
    weights = weights_of(lengths, config)
    return [
        shard.replace(weights_S=shard.weights_S.new_tensor([weights.get(key, 0.0) for key in shard.samples]))
        for shard in minibatch.shards
    ]


def scattered(
    case: Case, values: Mapping[int, Sequence[float] | np.ndarray], fill: float, *, extra: int = 0
) -> np.ndarray:
    """[tokens + extra] float64: [R] values of samples at the tokens that predict their response tokens."""
    whole = np.full(case.tokens + extra, fill)
    for index, values_R in values.items():
        whole[case.predicting(index)] = values_R
    return whole


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


def routed_samples(case: Case, shape: RouteShape) -> list[Sample]:
    """The case's samples with its routes, as an engine would send them: [N + R - 1, L, K]."""
    if not case.replay:
        return list(case.samples)
    by_layer = [
        case.routes(layer, shape.num_experts, shape.top_k) if is_moe else np.zeros((case.tokens, shape.top_k))
        for layer, is_moe in enumerate(shape.moe_layers)
    ]
    routes_TLK = np.stack(by_layer, axis=1).astype(shape.dtype)
    return [replace(s, routes=routes_TLK[case.own(index)][:-1]) for index, s in enumerate(case.samples)]
