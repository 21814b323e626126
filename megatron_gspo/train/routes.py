"""The engine's routes: from the leader that holds them to the ranks that replay them, and what they say of the engine.

A leader fetches a response with its routes and sends both to the leader that trains on it (``train.batch.place``). From
there each rank of the replica gets the routes of its own layers and its own tokens, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_gspo.algorithm.packing import shard_positions
from megatron_gspo.algorithm.routing import counted_tokens, cut, cut_size, lay_out, pasted, route_changes
from megatron_gspo.errors import ReplayError
from megatron_gspo.parallel.exchange import gather_objects, scatter_bytes
from megatron_gspo.parallel.metrics import reduce_route_changes
from megatron_gspo.policy.groups import Groups, device
from megatron_gspo.train.batch import Minibatch
from megatron_gspo.train.replay import Dealt, MinibatchRoutes
from megatron_gspo.types import PackedBatch, RouteShape, RouteShard, Sample, Shard


def deal_routes(
    minibatches: Sequence[Minibatch], shape: RouteShape, layers: Sequence[int], groups: Groups
) -> list[list[RouteShard]]:
    """The engine's routes of each micro-batch, as far as this rank's routers choose them. Collective.

    Args:
        minibatches: of ``place``, whose samples hold their routes on the leader.
        layers: this rank's MoE layers, by their numbers over all stages from 0, ascending over its virtual stages.
    """
    owners = gather_objects((tuple(layers), groups.shard), groups.replica)
    return [
        [_deal(batch, samples, shape, owners, groups) for batch, samples in zip(m.batches, m.samples, strict=True)]
        for m in minibatches
    ]


def _deal(
    batch: PackedBatch,
    samples: Sequence[Sample],
    shape: RouteShape,
    owners: Sequence[tuple[tuple[int, ...], Shard]],
    groups: Groups,
) -> RouteShard:
    layers, shard = owners[groups.replica.rank()]
    tokens = batch.num_tokens // shard.size
    pieces = cut_for(batch, samples, shape, owners) if groups.is_leader else []
    own = scatter_bytes(pieces, cut_size(tokens, len(layers), shape), groups.replica, device())
    return pasted(own, layers, tokens, shape)


def cut_for(
    batch: PackedBatch,
    samples: Sequence[Sample],
    shape: RouteShape,
    owners: Sequence[tuple[tuple[int, ...], Shard]],
) -> list[torch.Tensor]:
    """For each rank, by its (layers, shard), the bytes of its part of a micro-batch's routes."""
    experts_TLK, present_T = lay_out(samples, batch, shape)
    boundaries = batch.cu_seqlens.cpu()
    return [
        torch.from_numpy(cut(experts_TLK, present_T, layers, shard_positions(boundaries, shard).numpy()))
        for layers, shard in owners
    ]


def check_coverage(samples: Sequence[Sample], least: float, groups: Groups) -> None:
    """Raises ReplayError on every rank when the engine gave routes for too few tokens. Collective.

    ``samples`` are a leader's. ``least`` is a share of all tokens but the last of each response, which can have none.
    """
    mine = [(len(s.routes) if s.routes is not None else 0, s.length - 1) for s in samples]
    parts = gather_objects(np.array(mine, dtype=np.int64).reshape(-1, 2).sum(axis=0), groups.world)
    there, possible = (int(count) for count in sum(parts))
    if there < least * possible:
        raise ReplayError(
            f"the engine gave routes for {there} of {possible} tokens ({there / possible:.1%}), below "
            f"replay.min_coverage = {least:g}: responses of mixed weight versions have none, and a capture may have "
            f"been cut"
        )


def changes_between(
    name: str,
    before: Sequence[RouteShard],
    after: Sequence[RouteShard],
    batches: Sequence[PackedBatch],
    groups: Groups,
) -> dict[str, float]:
    """``NAME``, ``NAME_tokens`` and ``NAME/layer_00``, ... of two passes over the same micro-batches. Collective.

    The share of experts that differ, mean over layers and by layer, and the share of tokens with a layer that differs,
    over the tokens of prompts and responses that have routes in both.
    """
    counted = [counted_tokens(batch, groups.shard) for batch in batches]
    changes = route_changes(before, after, counted)
    shares, tokens = reduce_route_changes(changes, stage=groups.tensor_data, pipeline=groups.pipeline)
    if not shares:
        return {}
    by_layer = {f"{name}/layer_{layer:02d}": share for layer, share in shares.items()}
    return {name: sum(shares.values()) / len(shares), f"{name}_tokens": tokens} | by_layer


def engine_mismatch(
    engine: Dealt, routes: Sequence[MinibatchRoutes], minibatches: Sequence[Minibatch], groups: Groups
) -> dict[str, float]:
    """``route/engine_mismatch*``: the engine's routes and the trainer's own in the pi_old pass. Collective."""
    asked = [shard for part in engine for shard in part]
    own = [shard for minibatch in routes for shard in minibatch.old]
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    return changes_between("route/engine_mismatch", asked, own, batches, groups)


def coverage(routes: Sequence[RouteShard], batches: Sequence[PackedBatch], groups: Groups) -> float:
    """Share of the tokens of prompts and responses that have a route to replay. Collective."""
    counts = torch.zeros(2, dtype=torch.float64, device=device())
    for shard, batch in zip(routes, batches, strict=True):
        counted_T = counted_tokens(batch, groups.shard)
        counts += torch.stack([(shard.present_T.to(device()) & counted_T).sum(), counted_T.sum()]).double()
    dist.all_reduce(counts, group=groups.tensor_data)
    return float(counts[0] / counts[1])
