"""From scored groups to packed micro-batches: who trains on what, decided by every leader, with the same result.

The unit is the outer step. Mini-batches are whole groups, cut by position; their micro-batches are planned here, once,
so that the pi_old pass and the training pass run over exactly the same tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_gspo.algorithm.weights import response_weights
from megatron_gspo.batching.packing import check_batch, check_vocabulary, dummy_batch, pack
from megatron_gspo.batching.planning import Plan, padded_length, plan_microbatches
from megatron_gspo.config import RunConfig
from megatron_gspo.megatron.groups import Groups, device
from megatron_gspo.parallel.exchange import broadcast_object, exchange, gather_objects, together
from megatron_gspo.types import PackedBatch, PlacedSample, RouteShard, Sample, TokenShard, Trained

Key = tuple[int, int]
"""(group, sample) of a response."""


@dataclass(frozen=True)
class MinibatchRoutes:
    """The routes of one mini-batch, a ``RouteShard`` a micro-batch: this rank's layers and tokens."""

    old: Sequence[RouteShard] = ()
    """What routers would choose by themselves in the pi_old pass; what they did choose in it, without R3."""
    replayed: Sequence[RouteShard] | None = None
    """What routers are made to choose in training; None: they choose for themselves."""


@dataclass(frozen=True)
class Minibatch:
    """One rank's share of a mini-batch, as far as the outer step has come with it."""

    batches: tuple[PackedBatch, ...]
    """Its micro-batches; as many as on every other data-parallel rank."""
    samples: tuple[tuple[PlacedSample, ...], ...]
    """What each micro-batch holds; empty for a dummy. Routes are there on the leader alone."""
    tokens: int
    """Tokens of the whole mini-batch, over all data-parallel ranks."""
    shards: tuple[TokenShard, ...] = ()
    """By micro-batch, this rank's tokens with the columns that the passes have made; empty but on the last stage."""
    routes: MinibatchRoutes = MinibatchRoutes()
    """After the pi_old pass."""
    trained: tuple[Trained, ...] = ()
    """By micro-batch, what training gave; empty but on the last stage."""

    def with_shards(self, shards: Iterable[TokenShard]) -> Minibatch:
        """With other shards."""
        return replace(self, shards=tuple(shards))


def place(mine: Sequence[Sample], config: RunConfig, groups: Groups) -> list[Minibatch]:
    """Plans an outer step and moves samples to where they are trained. Collective.

    Args:
        mine: on each data-parallel leader, the samples of the groups that it fetched; ignored elsewhere.
            ``Sample.group`` is the prompt's position among the outer step's prompts.
    Returns:
        The mini-batches that have a surviving group, in order, the same number of them on every rank.
    """
    placed: list[list[tuple[PlacedSample, ...]]] | None = None
    totals: list[int] = []
    if groups.is_leader:
        placed, totals = _exchange_samples(mine, config, groups)
    told = broadcast_object((_without_routes(placed), totals), groups.leader_rank, groups.replica)
    if not groups.is_leader:
        placed, totals = told
    return [
        Minibatch(tuple(pack_on_device(part, config, groups) for part in parts), tuple(parts), tokens)
        for parts, tokens in zip(placed or [], totals, strict=True)
    ]


def check_tokens(mine: Sequence[Sample], vocab_size: int, groups: Groups) -> None:
    """Raises BatchError on every rank when a leader's samples hold a token outside the vocabulary. Collective."""
    together(lambda: check_vocabulary(mine, vocab_size) if groups.is_leader else None, groups.world)


def pack_on_device(samples: Sequence[PlacedSample], config: RunConfig, groups: Groups) -> PackedBatch:
    """One micro-batch on this rank's device; a dummy when there are no samples."""
    dtype, tensor, context = loss_dtype(config), groups.tensor.size(), groups.context.size()
    if not samples:
        return dummy_batch(dtype, tensor=tensor, context=context).to(device())
    batch = pack(samples, loss_dtype=dtype, tensor=tensor, context=context)
    check_batch(batch)
    return batch.to(device())


def loss_dtype(config: RunConfig) -> torch.dtype:
    """Of advantages, weights and ratios: float32, or float64 for a float64 model."""
    return torch.float64 if config.model.dtype == "float64" else torch.float32


def _exchange_samples(
    mine: Sequence[Sample], config: RunConfig, groups: Groups
) -> tuple[list[list[tuple[PlacedSample, ...]]], list[int]]:
    """On the leaders: plans every mini-batch from all leaders' lengths, then swaps samples for their places."""
    described = {(s.group, s.sample): (s.length, s.num_trained) for s in mine}
    lengths: dict[Key, tuple[int, int]] = {}
    for part in gather_objects(described, groups.data):
        lengths |= part
    per_minibatch = config.train.prompts_per_step // config.minibatches
    keys_of = [
        sorted(key for key in lengths if key[0] // per_minibatch == minibatch)
        for minibatch in range(config.minibatches)
    ]
    keys_of = [keys for keys in keys_of if keys]
    plans = [_plan([lengths[key][0] for key in keys], config, groups) for keys in keys_of]
    weights: dict[Key, float] = {}
    home: dict[Key, int] = {}
    for keys, plan in zip(keys_of, plans, strict=True):
        weights |= weights_of({key: lengths[key][1] for key in keys}, config)
        home |= dict(zip(keys, plan.rank_S.tolist(), strict=True))
    outgoing: list[list[PlacedSample]] = [[] for _ in range(groups.data_size)]
    for sample in mine:
        key = (sample.group, sample.sample)
        outgoing[home[key]].append(sample.placed(weights[key]))
    arrived = {(s.group, s.sample): s for s in exchange(outgoing, groups.data, device())}
    placed = [
        [tuple(arrived[keys[index]] for index in indices) for indices in plan.microbatches(groups.data_rank)]
        for keys, plan in zip(keys_of, plans, strict=True)
    ]
    return placed, [sum(lengths[key][0] for key in keys) for keys in keys_of]


def _without_routes(
    placed: list[list[tuple[PlacedSample, ...]]] | None,
) -> list[list[tuple[PlacedSample, ...]]] | None:
    """The samples as the whole replica needs them: routes are most of their bytes, and each rank needs few of those."""
    return placed and [[tuple(replace(s, routes=None) for s in part) for part in parts] for parts in placed]


def _plan(lengths: Sequence[int], config: RunConfig, groups: Groups) -> Plan:
    """Lengths are those that the model will see: filled up for context parallelism."""
    return plan_microbatches(
        padded_length(np.asarray(lengths), groups.context.size()),
        token_budget=config.train.microbatch_tokens,
        num_ranks=groups.data_size,
        oversize=config.train.oversize,
        multiple_of=config.parallel.microbatch_multiple,
    )


def weights_of(response_lengths: dict[Key, int], config: RunConfig) -> dict[Key, float]:
    """Each response's share of its mini-batch, over all data-parallel ranks."""
    groups: dict[int, list[Key]] = {}
    for key in response_lengths:
        groups.setdefault(key[0], []).append(key)
    shares = response_weights(
        config.algorithm.weighting,
        [[response_lengths[key] for key in keys] for keys in groups.values()],
        max_response_tokens=config.rollout.max_response_tokens,
    )
    return {
        key: float(share)
        for keys, shares_G in zip(groups.values(), shares, strict=True)
        for key, share in zip(keys, np.asarray(shares_G), strict=True)
    }
