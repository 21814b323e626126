"""The routers' choices of an outer step: what the passes replay, and what they say of the engine and of the updates.

A leader fetches a response with its routes and sends both to the leader that trains on it (``train.batch.place``). From
there each rank of the replica gets the routes of its own layers and its own tokens, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
import torch.distributed as dist

from megatron_gspo.algorithm.routing import counted_tokens, cut, cut_size, lay_out, pasted, route_changes
from megatron_gspo.batching.packing import shard_positions
from megatron_gspo.errors import ReplayError
from megatron_gspo.megatron.groups import Groups, device
from megatron_gspo.parallel.exchange import gather_objects, scatter_bytes
from megatron_gspo.parallel.sums import reduce_route_changes
from megatron_gspo.train.batch import Minibatch, MinibatchRoutes
from megatron_gspo.train.learner import Learner
from megatron_gspo.types import PackedBatch, RouteShape, RouteShard, Sample, Shard

Dealt = Sequence[Sequence[RouteShard]]
"""The engine's routes of an outer step, by mini-batch and micro-batch: this rank's layers and tokens."""


@dataclass(frozen=True)
class Routing:
    """Which routes the passes of one outer step replay. Under "r2" training replays what the pi_old pass chose; under
    "r3" both replay what the engine chose; "off": routers choose for themselves."""

    mode: str
    """``replay.mode``."""
    engine: Dealt | None = None
    """None in an outer step that did not ask for them."""

    def of_old_pass(self) -> list[RouteShard] | None:
        """What the pi_old pass replays. Raises ReplayError when R3 has no routes of the engine."""
        if self.mode != "r3":
            return None
        if self.engine is None:
            raise ReplayError('replay.mode = "r3", and the responses of this outer step came without routes')
        return list(chain.from_iterable(self.engine))

    def of_training(self, sizes: Sequence[int], live: Sequence[RouteShard]) -> list[MinibatchRoutes]:
        """By mini-batch.

        Args:
            sizes: micro-batches of each mini-batch.
            live: what routers would have chosen in the pi_old pass, over all of them.
        """
        rest = iter(live)
        olds = [list(islice(rest, size)) for size in sizes]
        replayed: Sequence[Sequence[RouteShard] | None] = [None] * len(olds)
        if self.mode != "off":
            replayed = olds if self.mode == "r2" else self.engine or []
        return [MinibatchRoutes(own, routes) for own, routes in zip(olds, replayed, strict=True)]

    def mismatch(self, run: Learner, minibatches: Sequence[Minibatch]) -> dict[str, float]:
        """``route/engine_mismatch*``: the engine's routes and the trainer's own in the pi_old pass; empty without the
        engine's. Collective."""
        if self.engine is None:
            return {}
        asked = [shard for part in self.engine for shard in part]
        own = [shard for minibatch in minibatches for shard in minibatch.routes.old]
        batches = [batch for minibatch in minibatches for batch in minibatch.batches]
        return changes_between("route/engine_mismatch", asked, own, batches, run.groups)


def open_routing(run: Learner, samples: Sequence[Sample], minibatches: Sequence[Minibatch], outer_step: int) -> Routing:
    """The routing of an outer step, with this rank's part of the engine's routes where they were asked for. Collective.

    Raises ReplayError when they are to be replayed and cover too few tokens.
    """
    settings = run.config.replay
    if not settings.asks_for_routes(outer_step):
        return Routing(settings.mode)
    if settings.mode == "r3":
        check_coverage(samples, settings.min_coverage, run.groups)
    return Routing(
        settings.mode, deal_routes(minibatches, run.policy.shape.routes, run.policy.replay.layers, run.groups)
    )


def routing_metrics(
    run: Learner, minibatch: Minibatch, live: Sequence[RouteShard], outer_step: int
) -> dict[str, float]:
    """``route/drift*`` and ``replay/coverage`` of one mini-batch, whose routers would have chosen ``live`` in
    training; on every rank. Collective."""
    metrics: dict[str, float] = {}
    if run.policy.shape.num_experts and run.config.replay.measures_drift(outer_step):
        metrics |= changes_between("route/drift", minibatch.routes.old, live, minibatch.batches, run.groups)
    if minibatch.routes.replayed is not None:
        metrics["replay/coverage"] = coverage(minibatch.routes.replayed, minibatch.batches, run.groups)
    return metrics


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


def coverage(routes: Sequence[RouteShard], batches: Sequence[PackedBatch], groups: Groups) -> float:
    """Share of the tokens of prompts and responses that have a route to replay. Collective."""
    counts = torch.zeros(2, dtype=torch.float64, device=device())
    for shard, batch in zip(routes, batches, strict=True):
        counted_T = counted_tokens(batch, groups.shard)
        counts += torch.stack([(shard.present_T.to(device()) & counted_T).sum(), counted_T.sum()]).double()
    dist.all_reduce(counts, group=groups.tensor_data)
    return float(counts[0] / counts[1])
