"""Responses kept for reading, a few whole groups: what the trainer made of them, token by token."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from megatron_gspo.batching.packing import unshard_tokens
from megatron_gspo.data.tokenizer import token_texts
from megatron_gspo.megatron.groups import device
from megatron_gspo.parallel.exchange import broadcast_object, exchange, gather_pieces
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.batch import Key, Minibatch
from megatron_gspo.types import RolloutGroup, RolloutRecord, Sample, TokenShard


@dataclass(frozen=True)
class _Measured:
    ratio: float
    clipped: bool
    advantage: float
    old_logprobs: list[float]
    new_logprobs: list[float]


def read_samples(
    run: Run,
    minibatches: Sequence[Minibatch],
    groups: Mapping[int, RolloutGroup],
    samples: Sequence[Sample],
) -> list[RolloutRecord]:
    """Whole groups of ``train.save_rollouts`` responses or a few more, on the first rank; empty elsewhere. Collective.

    They are among those that the first leader fetched, spread evenly; their responses may be trained on anywhere.

    Args:
        groups: what this leader fetched, by position among the outer step's prompts; empty on other ranks.
        samples: the responses of ``groups``, with their advantages.
    """
    if not run.config.train.save_rollouts:
        return []
    wanted = math.ceil(run.config.train.save_rollouts / run.config.rollout.group_size)
    chosen = broadcast_object(spread(sorted(groups), wanted), 0, run.groups.world)
    measured: dict[Key, _Measured] | None = None
    if run.groups.is_last_stage:
        measured = _of_all_replicas(run, _measure(run, minibatches, chosen))
    if run.groups.data_rank != 0:
        return []
    measured = broadcast_object(measured, run.groups.last_stage_leader_rank, run.groups.replica)
    if not run.groups.is_leader:
        return []
    trained = (s for s in samples if s.group in chosen and (s.group, s.sample) in measured)  # a step may be left out
    kept = sorted(trained, key=lambda s: (s.group, s.sample))
    return [_record(run, groups[s.group], s, measured[s.group, s.sample]) for s in kept]


def spread(positions: Sequence[int], count: int) -> list[int]:
    """``count`` of them, or all, evenly spread from the first on."""
    stride = max(1, len(positions) / count)
    return [positions[int(index * stride)] for index in range(min(count, len(positions)))]


def _of_all_replicas(run: Run, mine: dict[Key, _Measured]) -> dict[Key, _Measured]:
    """On the last stage of the first replica, at its first rank: what every replica measured. Collective there."""
    if run.groups.token.rank() != 0:
        return {}
    outgoing: list[list[tuple[Key, _Measured]]] = [[] for _ in range(run.groups.data_size)]
    outgoing[0] = list(mine.items())
    return dict(exchange(outgoing, run.groups.data, device()))


def _measure(
    run: Run,
    minibatches: Sequence[Minibatch],
    chosen: Collection[int],
) -> dict[Key, _Measured]:
    """On the last stage: puts the micro-batches that hold a response of a chosen group together from the ranks'
    tokens."""
    measured: dict[Key, _Measured] = {}
    batches = [batch for minibatch in minibatches for batch in minibatch.batches]
    shards = [shard for minibatch in minibatches for shard in minibatch.shards]
    outputs = [trained for minibatch in minibatches for trained in minibatch.trained]
    of_each = zip(batches, shards, outputs, strict=True)
    for batch, shard, (new_T, _, output) in of_each:
        if not any(group in chosen for group, _ in shard.samples):
            continue
        old, new, clipped = (
            unshard_tokens(gather_pieces(piece_T, run.groups.token), batch.cu_seqlens, run.groups.shard).cpu()
            for piece_T in (
                shard.trainer_logprobs_T if TokenShard.trainer_logprobs_T in shard else shard.old_logprobs_T,
                new_T,
                output.clipped_low_T | output.clipped_high_T,
            )
        )
        mask, sequence = batch.mask_T.cpu(), batch.sequence_T.cpu()  # the shard's may leave tokens out
        for index, key in enumerate(shard.samples):
            if key[0] in chosen:
                own = mask & (sequence == index)
                measured[key] = _Measured(
                    ratio=float(output.log_ratio_S[index].double().exp()),  # an infinity, where math.exp would raise
                    clipped=bool(clipped[own].any()),
                    advantage=float(shard.advantages_S[index]),
                    old_logprobs=old[own].tolist(),
                    new_logprobs=new[own].tolist(),
                )
    return measured


def _record(run: Run, group: RolloutGroup, sample: Sample, measured: _Measured) -> RolloutRecord:
    at, rollout = next(pair for pair in enumerate(group.rollouts) if pair[1].sample == sample.sample)
    return RolloutRecord(
        prompt_id=group.prompt.id,
        sample=sample.sample,
        prompt=group.prompt.text,
        response=rollout.text,
        tokens=token_texts(run.tokenizer, sample.token_ids[sample.trained].tolist()),
        reward=sample.reward,
        advantage=measured.advantage if run.config.algorithm.credit_waits else sample.advantage,
        finish_reason=rollout.finish_reason,
        ratio=measured.ratio,
        clipped=measured.clipped,
        rollout_logprobs=sample.rollout_logprobs.tolist(),
        old_logprobs=measured.old_logprobs,
        new_logprobs=measured.new_logprobs,
        group=sample.group,
        answer=group.prompt.answer or None,
        components=group.components_G[at] or None if group.components_G else None,
    )
