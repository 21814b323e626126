"""Samples end to end in one micro-batch, and a micro-batch cut among tensor ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megatron_gspo.errors import BatchError
from megatron_gspo.types import PackedBatch, Sample, TokenShard


def pack(samples: Sequence[Sample], *, multiple: int, loss_dtype: torch.dtype) -> PackedBatch:
    """Lays samples end to end, as ``PackedBatch`` describes it.

    Args:
        samples: at least one; they become sequences 0 ... S - 1 in this order.
        multiple: T is padded up to a multiple of it, with a sequence of its own.
        loss_dtype: of advantages and weights (torch.float32, or torch.float64 in a float64 run).
    Raises:
        BatchError: no samples, an empty prompt or response, or per-token fields of another length than the response.
    """
    prompts_S, responses_S = _checked_lengths(samples)
    lengths_S = prompts_S + responses_S
    starts_S = np.concatenate([[0], np.cumsum(lengths_S)])
    used, total = int(starts_S[-1]), _round_up(int(starts_S[-1]), multiple)

    tokens_T = np.zeros(total, dtype=np.int64)
    tokens_T[:used] = np.concatenate([ids for s in samples for ids in (s.prompt_ids, s.response_ids)])
    sequence_T = np.full(total, len(samples), dtype=np.int64)
    sequence_T[:used] = np.repeat(np.arange(len(samples)), lengths_S)

    position_T = np.arange(used) - np.repeat(starts_S[:-1], lengths_S)
    first_T, last_T = np.repeat(prompts_S - 1, lengths_S), np.repeat(lengths_S - 1, lengths_S)
    mask_T = np.zeros(total, dtype=bool)
    mask_T[:used] = (position_T >= first_T) & (position_T < last_T)
    labels_T = np.zeros(total, dtype=np.int64)
    labels_T[: used - 1] = tokens_T[1:used]
    labels_T[starts_S[1:] - 1] = 0  # a sequence's last position would predict the next sequence's first token

    rollout_logprobs_T = np.zeros(total, dtype=np.float32)
    rollout_logprobs_T[mask_T] = np.concatenate([s.rollout_logprobs for s in samples])
    advantages_T = np.zeros(total, dtype=np.float64)
    advantages_T[mask_T] = np.concatenate([s.token_advantages for s in samples])
    boundaries = starts_S if used == total else np.append(starts_S, total)
    return PackedBatch(
        tokens_T=torch.from_numpy(tokens_T),
        labels_T=torch.from_numpy(labels_T),
        mask_T=torch.from_numpy(mask_T),
        sequence_T=torch.from_numpy(sequence_T),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        rollout_logprobs_T=torch.from_numpy(rollout_logprobs_T),
        advantages_T=torch.from_numpy(advantages_T).to(loss_dtype),
        advantages_S=torch.tensor([s.advantage for s in samples], dtype=loss_dtype),
        weights_S=torch.tensor([s.weight for s in samples], dtype=loss_dtype),
        lengths_S=torch.from_numpy(responses_S),
        samples=tuple((s.group, s.sample) for s in samples),
    )


def dummy_batch(multiple: int, loss_dtype: torch.dtype) -> PackedBatch:
    """A micro-batch without a response, for a rank that has fewer micro-batches than its peers.

    It runs forward and backward like any other, so that every rank enters every collective, and adds exactly nothing:
    one sequence of ``multiple`` tokens 0, weight 0, nothing in the mask.
    """
    zeros_T = torch.zeros(multiple, dtype=torch.int64)
    return PackedBatch(
        tokens_T=zeros_T,
        labels_T=zeros_T.clone(),
        mask_T=torch.zeros(multiple, dtype=torch.bool),
        sequence_T=zeros_T.clone(),
        cu_seqlens=torch.tensor([0, multiple], dtype=torch.int32),
        rollout_logprobs_T=torch.zeros(multiple, dtype=torch.float32),
        advantages_T=torch.zeros(multiple, dtype=loss_dtype),
        advantages_S=torch.zeros(1, dtype=loss_dtype),
        weights_S=torch.zeros(1, dtype=loss_dtype),
        lengths_S=torch.zeros(1, dtype=torch.int64),
        samples=((-1, -1),),
    )


def shard_tokens(batch: PackedBatch, index: int, count: int) -> TokenShard:
    """The ``index``-th of ``count`` contiguous slices of T, with the per-sequence fields whole.

    Raises BatchError when ``count`` does not divide T: pack with a multiple of it.
    """
    if batch.num_tokens % count:
        raise BatchError(f"{batch.num_tokens} tokens do not divide among {count} ranks: pack to a multiple of {count}")
    local = batch.num_tokens // count
    own = slice(index * local, (index + 1) * local)
    return TokenShard(
        labels_T=batch.labels_T[own],
        mask_T=batch.mask_T[own],
        sequence_T=batch.sequence_T[own],
        rollout_logprobs_T=batch.rollout_logprobs_T[own],
        advantages_T=batch.advantages_T[own],
        advantages_S=batch.advantages_S,
        weights_S=batch.weights_S,
        lengths_S=batch.lengths_S,
        samples=batch.samples,
    )


def check_batch(batch: PackedBatch) -> None:
    """Raises BatchError when a batch contradicts itself: field sizes, boundaries, or masks against lengths."""
    tokens, sequences = batch.num_tokens, batch.num_sequences
    for name in ("labels_T", "mask_T", "sequence_T", "rollout_logprobs_T", "advantages_T"):
        if (size := getattr(batch, name).numel()) != tokens:
            raise BatchError(f"{name} has {size} entries for {tokens} tokens")
    for name in ("advantages_S", "weights_S", "lengths_S"):
        if (size := getattr(batch, name).numel()) != sequences:
            raise BatchError(f"{name} has {size} entries for {sequences} sequences")
    boundaries = batch.cu_seqlens.long()
    sizes = boundaries.diff()
    if boundaries[0] != 0 or boundaries[-1] != tokens or (sizes <= 0).any() or len(sizes) - sequences not in (0, 1):
        raise BatchError(f"cu_seqlens {_short(boundaries)} does not cut {tokens} tokens into {sequences} sequences")
    owners = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    if not torch.equal(owners, batch.sequence_T):
        raise BatchError("sequence_T disagrees with cu_seqlens")
    counts = torch.bincount(batch.sequence_T[batch.mask_T], minlength=sequences)
    if counts.numel() > sequences:
        raise BatchError(f"{int(counts[sequences:].sum())} padding positions are in the mask")
    if not torch.equal(counts, batch.lengths_S):
        i = int((counts != batch.lengths_S).nonzero()[0])
        raise BatchError(
            f"response {batch.samples[i]} has {int(counts[i])} positions in the mask "
            f"and a length of {int(batch.lengths_S[i])}"
        )


def _checked_lengths(samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """([S] prompt tokens, [S] response tokens), int64."""
    if not samples:
        raise BatchError("a micro-batch needs at least one sample: use dummy_batch for an idle rank")
    for s in samples:
        n, r = len(s.prompt_ids), len(s.response_ids)
        if n == 0 or r == 0 or len(s.rollout_logprobs) != r or len(s.token_advantages) != r:
            raise BatchError(
                f"response {s.sample} of group {s.group} has {n} prompt tokens, {r} response tokens, "
                f"{len(s.rollout_logprobs)} rollout logprobs and {len(s.token_advantages)} token advantages"
            )
    prompts_S = np.array([len(s.prompt_ids) for s in samples], dtype=np.int64)
    return prompts_S, np.array([len(s.response_ids) for s in samples], dtype=np.int64)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _short(values: torch.Tensor) -> str:
    items = values.tolist()
    return str(items if len(items) <= 8 else [*items[:4], "...", *items[-4:]])
