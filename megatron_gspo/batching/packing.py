"""Samples end to end in one micro-batch, and a micro-batch cut among context and tensor ranks.

Context parallelism deals every sequence out in zigzag order: cut into 2n chunks of one length, rank r of n holds chunks
r and 2n - 1 - r. Causal attention of chunk j costs (2j + 1) / (2n)^2 of the sequence's, so each rank has the same share
of it, 1/n, exactly (contiguous slices would give the last rank 2n - 1 times the work of the first).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_gspo.batching.planning import padded_length
from megatron_gspo.errors import BatchError
from megatron_gspo.types import (
    Axis,
    Column,
    Columns,
    PackedBatch,
    PlacedSample,
    Sample,
    Shard,
    TokenShard,
    packed_columns,
)


def pack(
    samples: Sequence[PlacedSample],
    *,
    loss_dtype: torch.dtype,
    tensor: int = 1,
    context: int = 1,
    pad_to: int = 1,
    columns: Sequence[Column] = (),
) -> PackedBatch:
    """Lays samples end to end, as ``PackedBatch`` describes it.

    Args:
        samples: at least one; they become sequences 0 ... S - 1 in this order.
        loss_dtype: of columns that name no dtype (torch.float32, or torch.float64 in a float64 run).
        tensor, context: ranks that the tokens will be spread over.
        pad_to: T is padded up to ``pad_to`` times what these need (tests use it: no result may depend on padding).
        columns: that samples hold beside those of ``Columns``.
    Raises:
        BatchError: no samples, or one that contradicts itself.
    """
    lengths_S = _checked_lengths(samples)
    boundaries = np.concatenate([[0], np.cumsum(padded_length(lengths_S, context))])
    multiple = pad_to * _total_multiple(tensor, context)
    total = -(-int(boundaries[-1]) // multiple) * multiple
    if total > boundaries[-1]:
        boundaries = np.append(boundaries, total)

    # Every token's place in T, and its place in its own sequence.
    offset = np.arange(lengths_S.sum()) - np.repeat(np.cumsum(lengths_S) - lengths_S, lengths_S)
    place = np.repeat(boundaries[: len(samples)], lengths_S) + offset
    predicts = place[offset < np.repeat(lengths_S - 1, lengths_S)]  # the last position has nothing to predict
    ids = np.concatenate([s.token_ids for s in samples])

    labels_T = np.zeros(total, dtype=np.int64)
    labels_T[predicts] = ids[offset > 0]
    mask_T = np.zeros(total, dtype=bool)
    mask_T[predicts] = np.concatenate([s.trained[1:] for s in samples])
    sequence_T = np.full(total, len(samples), dtype=np.int64)
    sequence_T[place] = np.repeat(np.arange(len(samples)), lengths_S)

    laid_out = {
        Columns.labels_T: torch.from_numpy(labels_T),
        Columns.mask_T: torch.from_numpy(mask_T),
        Columns.sequence_T: torch.from_numpy(sequence_T),
    }
    places = {Axis.INPUT: place, Axis.PREDICTION: np.flatnonzero(mask_T)}
    for column in (Columns.tokens_T, *packed_columns(), *columns):
        laid_out[column] = _column(column, samples, total, places, loss_dtype)
    return PackedBatch(
        laid_out,
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        samples=tuple((s.group, s.sample) for s in samples),
    )


def _column(
    column: Column,
    samples: Sequence[PlacedSample],
    total: int,
    places: Mapping[Axis, np.ndarray],
    loss_dtype: torch.dtype,
) -> torch.Tensor:
    """A column's values of these samples, at their places in a micro-batch of ``total`` tokens."""
    assert column.of is not None
    dtype = column.dtype or loss_dtype
    values = [column.of(s) for s in samples]
    if not column.axis.per_token:
        return torch.tensor(values, dtype=dtype)
    laid_out = np.full(total, column.fill, dtype=np.float64 if dtype.is_floating_point else np.int64)
    laid_out[places[column.axis]] = np.concatenate(values)
    return torch.from_numpy(laid_out).to(dtype)


def dummy_batch(
    loss_dtype: torch.dtype, *, tensor: int = 1, context: int = 1, columns: Sequence[Column] = ()
) -> PackedBatch:
    """A micro-batch without a response, for a rank that has fewer micro-batches than its peers.

    It runs forward and backward like any other, so that every rank enters every collective, and adds exactly nothing:
    one sequence of tokens 0, as short as sharding allows, weight 0, nothing in the mask.
    """
    total = _total_multiple(tensor, context)
    structure = (Columns.tokens_T, Columns.labels_T, Columns.mask_T, Columns.sequence_T)
    return PackedBatch(
        {
            column: torch.full((total if column.axis.per_token else 1,), column.fill, dtype=column.dtype or loss_dtype)
            for column in (*structure, *packed_columns(), *columns)
        },
        cu_seqlens=torch.tensor([0, total], dtype=torch.int32),
        samples=((-1, -1),),
    )


def zigzag_positions(cu_seqlens: torch.Tensor, context: int, rank: int) -> torch.Tensor:
    """The positions in T that context rank ``rank`` of ``context`` holds, in the order in which it holds them.

    Of each sequence in turn, its chunk ``rank`` and then its chunk 2 * context - 1 - rank. One rank holds all
    positions, in order.

    Args:
        cu_seqlens: [S + 1] boundaries; every length is a multiple of 2 * context.
    Returns:
        [T / context] int64, on the device of ``cu_seqlens``.
    """
    total = int(cu_seqlens[-1])
    if context == 1:
        return torch.arange(total, device=cu_seqlens.device)
    own_lengths = cu_seqlens.diff().long() // context
    starts, chunks = (
        torch.repeat_interleave(values, own_lengths, output_size=total // context)
        for values in (cu_seqlens[:-1].long(), own_lengths // 2)
    )
    # A rank holds 1/context of what lies before a sequence, so its own part of the sequence starts there.
    offset = torch.arange(total // context, device=cu_seqlens.device) - starts // context
    skipped = torch.where(offset < chunks, rank, 2 * context - 2 - rank)
    return starts + offset + skipped * chunks


def shard_positions(cu_seqlens: torch.Tensor, shard: Shard) -> torch.Tensor:
    """[T_local] int64: the positions in T of the tokens that a rank stores, in the order in which it stores them."""
    positions = zigzag_positions(cu_seqlens, shard.context_size, shard.context_rank)
    return positions.view(shard.tensor_size, -1)[shard.tensor_rank]


def shard_tokens(batch: PackedBatch, shard: Shard) -> TokenShard:
    """A rank's part of the per-token fields, with the per-sequence fields whole.

    Raises BatchError when the batch was not packed for that many ranks.
    """
    check_divides(batch, shard)
    own = shard_positions(batch.cu_seqlens, shard)
    return TokenShard(
        {column: values[own] if column.axis.per_token else values for column, values in batch}, samples=batch.samples
    )


def unshard_tokens(pieces: Sequence[torch.Tensor], cu_seqlens: torch.Tensor, shard: Shard) -> torch.Tensor:
    """What the ranks stored, back in the order of T: the inverse of sharding.

    Args:
        pieces: [T_local] of each of the ranks among which the tokens are spread, tensor ranks first (as in
            ``Groups.token``).
        cu_seqlens: the micro-batch's.
        shard: any of them; only the sizes are read.
    """
    ranks = [
        replace(shard, tensor_rank=tensor, context_rank=context)
        for context in range(shard.context_size)
        for tensor in range(shard.tensor_size)
    ]
    whole_T = torch.empty_like(torch.cat(list(pieces)))
    for piece, rank in zip(pieces, ranks, strict=True):
        whole_T[shard_positions(cu_seqlens, rank)] = piece
    return whole_T


def check_divides(batch: PackedBatch, shard: Shard) -> None:
    """Raises BatchError when a micro-batch cannot be dealt out to that many context and tensor ranks."""
    tensor, context = shard.tensor_size, shard.context_size
    if batch.num_tokens % (tensor * context) or (batch.cu_seqlens.diff() % padded_length(1, context)).any():
        raise BatchError(
            f"sequences that end at {_short(batch.cu_seqlens[1:])} do not divide among {context} context x "
            f"{tensor} tensor ranks: pack with context={context}, tensor={tensor}"
        )


def check_batch(batch: PackedBatch) -> None:
    """Raises BatchError when a batch contradicts itself: field sizes, boundaries, or masks against lengths."""
    tokens, sequences = batch.tokens_T.numel(), batch.num_sequences
    for column, values in batch:
        of_what, size = ("tokens", tokens) if column.axis.per_token else ("sequences", sequences)
        if values.numel() != size:
            raise BatchError(f"{column.name} has {values.numel()} entries for {size} {of_what}")
    boundaries = batch.cu_seqlens.long()
    sizes = boundaries.diff()
    if boundaries[0] != 0 or boundaries[-1] != tokens or (sizes <= 0).any() or len(sizes) - sequences not in (0, 1):
        raise BatchError(f"cu_seqlens {_short(boundaries)} does not cut {tokens} tokens into {sequences} sequences")
    owners = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    padding = batch.sequence_T == sequences
    begins_again = padding[:-1] & ~padding[1:] & (owners[:-1] == owners[1:])
    if ((owners != batch.sequence_T) & ~padding).any() or begins_again.any():
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


def check_vocabulary(samples: Sequence[Sample], vocab_size: int) -> None:
    """Raises BatchError for a token that is none of the model's ``vocab_size``.

    The embedding of such a token, and its logprob, would be those of another or of none.
    """
    for s in samples:
        ids = s.token_ids
        if ids.min() < 0 or ids.max() >= vocab_size:
            place = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
            kind = "a response's" if s.trained[place] else "the prompt's"
            raise BatchError(
                f"response {s.sample} of group {s.group}: token {int(ids[place])} at place {place}, one of {kind}, is "
                f"none of the model's vocabulary of {vocab_size}: is the tokenizer another model's?"
            )


def _checked_lengths(samples: Sequence[Sample]) -> np.ndarray:
    """[S] tokens, int64."""
    if not samples:
        raise BatchError("a micro-batch needs at least one sample: use dummy_batch for an idle rank")
    for s in samples:
        tokens, marks, trained = len(s.token_ids), len(s.trained), s.num_trained
        values = len(s.rollout_logprobs), len(s.token_advantages)
        if not trained or s.trained[0] or marks != tokens or values != (trained, trained):
            raise BatchError(
                f"response {s.sample} of group {s.group} has {tokens} tokens, {marks} marks of which are trained, "
                f"{trained} of these true{' (the first among them)' if marks and s.trained[0] else ''}, {values[0]} "
                f"rollout logprobs and {values[1]} token advantages"
            )
    return np.array([s.length for s in samples], dtype=np.int64)


def _total_multiple(tensor: int, context: int) -> int:
    """What a micro-batch's length is rounded up to: whole sequences, and an equal slice for each rank."""
    return math.lcm(padded_length(1, context), context * tensor)


def _short(values: torch.Tensor) -> str:
    items = values.tolist()
    return str(items if len(items) <= 8 else [*items[:4], "...", *items[-4:]])
