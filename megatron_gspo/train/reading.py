"""Responses kept for reading: what the trainer made of a few of them, token by token."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_gspo.algorithm.packing import unshard_tokens
from megatron_gspo.data.tokenizer import token_texts
from megatron_gspo.parallel.exchange import broadcast_object, gather_pieces
from megatron_gspo.train.batch import Key, Minibatch
from megatron_gspo.train.context import Run
from megatron_gspo.types import RolloutGroup, RolloutRecord, Sample, TokenShard, Trained


@dataclass(frozen=True)
class _Measured:
    ratio: float
    clipped: bool
    old_logprobs: list[float]
    new_logprobs: list[float]


def read_samples(
    run: Run,
    minibatches: Sequence[Minibatch],
    shards: Sequence[Sequence[TokenShard]],
    outputs: Sequence[Sequence[Trained]],
    groups: Mapping[int, RolloutGroup],
) -> list[RolloutRecord]:
    """Up to ``train.save_rollouts`` responses, on the first rank; empty elsewhere. Collective over its replica.

    They are among those that the first leader both fetched and trains on, spread evenly.
    """
    if run.groups.data_rank != 0 or not run.config.train.save_rollouts:
        return []
    fetched = broadcast_object(set(groups), run.groups.leader_rank, run.groups.replica)
    chosen = _choose(minibatches, fetched, run.config.train.save_rollouts)
    measured: dict[Key, _Measured] | None = None
    if run.groups.is_last_stage:
        measured = _measure(run, minibatches, shards, outputs, set(chosen))
    measured = broadcast_object(measured, run.groups.last_stage_leader_rank, run.groups.replica)
    if not run.groups.is_leader:
        return []
    return [_record(run, groups[key[0]], chosen[key], measured[key]) for key in sorted(chosen)]


def _choose(minibatches: Sequence[Minibatch], fetched: set[int], count: int) -> dict[Key, Sample]:
    all_of_them = {
        (sample.group, sample.sample): sample
        for minibatch in minibatches
        for samples in minibatch.samples
        for sample in samples
        if sample.group in fetched
    }
    keys = sorted(all_of_them)
    stride = max(1, len(keys) / count)
    picked = [keys[int(index * stride)] for index in range(min(count, len(keys)))]
    return {key: all_of_them[key] for key in picked}


def _measure(
    run: Run,
    minibatches: Sequence[Minibatch],
    shards: Sequence[Sequence[TokenShard]],
    outputs: Sequence[Sequence[Trained]],
    chosen: set[Key],
) -> dict[Key, _Measured]:
    """On the last stage: puts the micro-batches that hold a chosen response together from the ranks' tokens."""
    measured: dict[Key, _Measured] = {}
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    of_each = zip(batches, itertools.chain(*shards), itertools.chain(*outputs), strict=True)
    for batch, shard, (new_T, _, output) in of_each:
        if not chosen.intersection(shard.samples):
            continue
        assert shard.old_logprobs_T is not None
        mask, sequence, old, new, clipped = (
            unshard_tokens(gather_pieces(piece_T, run.groups.token), batch.cu_seqlens, run.groups.shard).cpu()
            for piece_T in (
                shard.mask_T,
                shard.sequence_T,
                shard.old_logprobs_T,
                new_T,
                output.clipped_low_T | output.clipped_high_T,
            )
        )
        for index, key in enumerate(shard.samples):
            if key in chosen:
                own = mask & (sequence == index)
                measured[key] = _Measured(
                    ratio=float(output.log_ratio_S[index].double().exp()),  # an infinity, where math.exp would raise
                    clipped=bool(clipped[own].any()),
                    old_logprobs=old[own].tolist(),
                    new_logprobs=new[own].tolist(),
                )
    return measured


def _record(run: Run, group: RolloutGroup, sample: Sample, measured: _Measured) -> RolloutRecord:
    rollout = next(rollout for rollout in group.rollouts if rollout.sample == sample.sample)
    return RolloutRecord(
        prompt_id=group.prompt.id,
        sample=sample.sample,
        prompt=group.prompt.text,
        response=rollout.text,
        tokens=token_texts(run.tokenizer, sample.response_ids.tolist()),
        reward=sample.reward,
        advantage=sample.advantage,
        finish_reason=rollout.finish_reason,
        ratio=measured.ratio,
        clipped=measured.clipped,
        rollout_logprobs=sample.rollout_logprobs.tolist(),
        old_logprobs=measured.old_logprobs,
        new_logprobs=measured.new_logprobs,
    )
