"""Packing: alignment, padding, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.batching.packing import (
    check_batch,
    check_vocabulary,
    dummy_batch,
    pack,
    shard_positions,
    shard_tokens,
    unshard_tokens,
    zigzag_positions,
)
from megatron_gspo.errors import BatchError
from megatron_gspo.types import PackedBatch, PlacedSample, Sample, Shard


def sample(prompt: list[int], response: list[int], group: int = 0, index: int = 0) -> PlacedSample:
    size = len(response)
    return PlacedSample.of_response(
        group=group,
        sample=index,
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=np.array(response, dtype=np.int32),
        rollout_logprobs=-np.arange(1, size + 1, dtype=np.float32),
        advantage=0.5 + index,
        token_advantages=0.5 + index + np.arange(size) / 8,
        weight=0.125,
    )


TWO = [sample([1, 2, 3], [4, 5]), sample([6], [7, 8, 9], group=1, index=2)]


def test_labels_masks_and_values_are_aligned_to_the_position_that_predicts_them() -> None:
    batch = pack(TWO, tensor=4, loss_dtype=torch.float32)
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 0, 0]
    assert batch.labels_T.tolist() == [2, 3, 4, 5, 0, 7, 8, 9, 0, 0, 0, 0]
    assert batch.mask_T.int().tolist() == [0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0]
    assert batch.sequence_T.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert batch.rollout_logprobs_T.tolist() == [0, 0, -1, -2, 0, -1, -2, -3, 0, 0, 0, 0]
    assert batch.advantages_T.tolist() == [0, 0, 0.5, 0.625, 0, 2.5, 2.625, 2.75, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 12]
    assert batch.advantages_S.tolist() == [0.5, 2.5]
    assert batch.weights_S.tolist() == [0.125, 0.125]
    assert batch.lengths_S.tolist() == [2, 3]
    assert batch.samples == ((0, 0), (1, 2))
    assert (batch.tokens_T.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert batch.weights_S.dtype == batch.advantages_S.dtype == batch.advantages_T.dtype == torch.float32


def test_a_batch_that_fits_has_no_padding_sequence() -> None:
    batch = pack(TWO, tensor=3, loss_dtype=torch.float64)
    assert batch.cu_seqlens.tolist() == [0, 5, 9]
    assert batch.num_tokens == 9


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8)


@given(shapes=shapes, tensor=st.integers(1, 16), context=st.integers(1, 4), seed=st.integers(0, 100))
@settings(deadline=None)
def test_every_response_can_be_read_back_from_where_it_is_predicted(
    shapes: list[tuple[int, int]], tensor: int, context: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    samples = [sample(rng.integers(0, 99, n).tolist(), rng.integers(0, 99, r).tolist()) for n, r in shapes]
    batch = pack(samples, tensor=tensor, context=context, loss_dtype=torch.float64)
    check_batch(batch)
    for i, s in enumerate(samples):
        own = batch.mask_T & (batch.sequence_T == i)
        assert batch.labels_T[own].tolist() == s.token_ids[s.trained].tolist()
        assert batch.rollout_logprobs_T[own].tolist() == s.rollout_logprobs.tolist()
        assert batch.advantages_T[own].tolist() == s.token_advantages.tolist()
        first, last = batch.cu_seqlens[i].item(), batch.cu_seqlens[i + 1].item()
        end = first + s.length
        assert batch.tokens_T[first:last].tolist() == [*s.token_ids, *[0] * (last - end)]
        assert batch.sequence_T[first:last].tolist() == [i] * s.length + [len(samples)] * (last - end)
        assert own.nonzero().flatten().tolist() == (first + s.predicting).tolist()


@given(shapes=shapes, tensor=st.integers(1, 6), context=st.integers(1, 4))
@settings(deadline=None)
def test_only_what_sharding_needs_is_padded(shapes: list[tuple[int, int]], tensor: int, context: int) -> None:
    samples = [sample([1] * n, [2] * r) for n, r in shapes]
    batch = pack(samples, tensor=tensor, context=context, loss_dtype=torch.float64)
    chunks = 1 if context == 1 else 2 * context
    padded = batch.cu_seqlens.diff().tolist()
    assert all(size % chunks == 0 for size in padded)
    assert all(0 <= size - s.length < chunks for size, s in zip(padded, samples, strict=False))
    assert batch.num_tokens % (tensor * context) == 0
    tail = padded[len(samples) :]
    assert sum(tail) < np.lcm(chunks, tensor * context)
    assert context * tensor > 1 or batch.num_tokens == sum(s.length for s in samples)


def test_padding_behind_a_sequence_belongs_to_no_sequence() -> None:
    batch = pack(TWO, context=2, tensor=4, loss_dtype=torch.float32)
    assert batch.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert batch.tokens_T.tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7, 8, 9, 0, 0, 0, 0]
    assert batch.labels_T.tolist() == [2, 3, 4, 5, 0, 0, 0, 0, 7, 8, 9, 0, 0, 0, 0, 0]
    assert batch.mask_T.int().tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0]
    assert batch.sequence_T.tolist() == [0, 0, 0, 0, 0, 2, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2]
    assert batch.rollout_logprobs_T.tolist() == [0, 0, -1, -2, 0, 0, 0, 0, -1, -2, -3, 0, 0, 0, 0, 0]


def test_the_zigzag_is_the_front_chunk_and_its_mirror_image_of_every_sequence() -> None:
    cu_seqlens = torch.tensor([0, 12, 18], dtype=torch.int32)  # chunks of two and of one, for three ranks
    held = [zigzag_positions(cu_seqlens, 3, rank).tolist() for rank in range(3)]
    assert held == [[0, 1, 10, 11, 12, 17], [2, 3, 8, 9, 13, 16], [4, 5, 6, 7, 14, 15]]
    assert zigzag_positions(torch.tensor([0, 3, 5]), 1, 0).tolist() == [0, 1, 2, 3, 4]


chunk_counts = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(chunks=chunk_counts, context=st.integers(2, 5))
@settings(deadline=None)
def test_every_context_rank_has_the_same_share_of_a_sequences_causal_attention(chunks: list[int], context: int) -> None:
    """Exactly the same: the bound on imbalance is zero, a sequence at a time."""
    boundaries = np.cumsum([0, *(2 * context * chunk for chunk in chunks)])
    cu_seqlens = torch.from_numpy(boundaries.astype(np.int32))
    held = [zigzag_positions(cu_seqlens, context, rank).numpy() for rank in range(context)]
    assert sorted(np.concatenate(held).tolist()) == list(range(boundaries[-1]))
    for start, end in itertools.pairwise(boundaries.tolist()):
        pairs = {(held[r][(held[r] >= start) & (held[r] < end)] - start + 1).sum() for r in range(context)}
        length = end - start
        assert pairs == {length * (length + 1) // 2 // context}


@given(shapes=shapes, tensor=st.integers(1, 3), context=st.integers(1, 4))
@settings(deadline=None)
def test_shards_hold_every_position_once_and_unsharding_puts_them_back(
    shapes: list[tuple[int, int]], tensor: int, context: int
) -> None:
    samples = [sample([1] * n, [2] * r, index=i) for i, (n, r) in enumerate(shapes)]
    batch = pack(samples, tensor=tensor, context=context, loss_dtype=torch.float64)
    places = [Shard(t, tensor, c, context) for c in range(context) for t in range(tensor)]
    positions = [shard_positions(batch.cu_seqlens, place) for place in places]
    assert sorted(torch.cat(positions).tolist()) == list(range(batch.num_tokens))
    assert len({len(part) for part in positions}) == 1
    shards = [shard_tokens(batch, place) for place in places]
    for name in ("labels_T", "mask_T", "sequence_T", "rollout_logprobs_T", "advantages_T"):
        pieces = [getattr(shard, name) for shard in shards]
        assert torch.equal(unshard_tokens(pieces, batch.cu_seqlens, places[-1]), getattr(batch, name)), name


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_laid_end_to_end_are_the_batch(count: int) -> None:
    batch = pack(TWO, tensor=4, loss_dtype=torch.float64)
    shards = [shard_tokens(batch, Shard(index, count)) for index in range(count)]
    for name in ("labels_T", "mask_T", "sequence_T", "rollout_logprobs_T", "advantages_T"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(batch, name)), name
    for shard in shards:
        assert torch.equal(shard.lengths_S, batch.lengths_S)
        assert torch.equal(shard.advantages_S, batch.advantages_S)
        assert torch.equal(shard.weights_S, batch.weights_S)
        assert shard.samples == batch.samples


def test_tokens_that_do_not_divide_are_not_sharded() -> None:
    with pytest.raises(BatchError, match=r"end at \[5, 9\] do not divide among 1 context x 2 tensor ranks"):
        shard_tokens(pack(TWO, tensor=3, loss_dtype=torch.float64), Shard(tensor_size=2))
    with pytest.raises(BatchError, match=r"end at \[5, 9, 12\] do not divide among 2 context x 1 tensor ranks"):
        shard_tokens(pack(TWO, tensor=4, loss_dtype=torch.float64), Shard(context_size=2))


def test_a_dummy_has_one_sequence_of_weight_zero_and_nothing_to_learn() -> None:
    batch = dummy_batch(torch.float64, tensor=8)
    check_batch(batch)
    assert (batch.num_tokens, batch.num_sequences) == (8, 1)
    assert batch.samples == ((-1, -1),)
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert not batch.mask_T.any()
    assert batch.weights_S.tolist() == [0.0]
    spread = dummy_batch(torch.float64, tensor=3, context=2)
    check_batch(spread)
    assert spread.cu_seqlens.tolist() == [0, 12]
    assert len(shard_tokens(spread, Shard(2, 3, 1, 2)).mask_T) == 2


@pytest.mark.parametrize(
    "broken",
    [
        sample([], [1, 2]),
        sample([1], []),
        replace(TWO[0], rollout_logprobs=np.zeros(3, np.float32)),
        replace(TWO[0], token_advantages=np.zeros(1)),
    ],
)
def test_a_sample_that_contradicts_itself_is_refused_by_name(broken: Sample) -> None:
    with pytest.raises(BatchError, match="response 5 of group 3"):
        pack([TWO[0], replace(broken, group=3, sample=5)], loss_dtype=torch.float64)


def test_packing_nothing_is_refused() -> None:
    with pytest.raises(BatchError, match="at least one sample"):
        pack([], loss_dtype=torch.float64)


def test_check_batch_finds_what_does_not_add_up() -> None:
    batch = pack(TWO, tensor=4, loss_dtype=torch.float64)
    check_batch(batch)
    in_padding, one_more = batch.mask_T.clone(), batch.mask_T.clone()
    in_padding[-1] = one_more[0] = True
    broken = {
        r"response \(0, 0\) has 3 positions in the mask and a length of 2": batch.replace(mask_T=one_more),
        r"response \(1, 2\) has 3 positions in the mask and a length of 4": batch.replace(
            lengths_S=torch.tensor([2, 4])
        ),
        "1 padding positions": batch.replace(mask_T=in_padding),
        "labels_T has 11 entries for 12 tokens": batch.replace(labels_T=batch.labels_T[1:]),
        "weights_S has 1 entries for 2 sequences": batch.replace(weights_S=batch.weights_S[1:]),
        "does not cut 12 tokens into 2": PackedBatch(
            dict(batch), cu_seqlens=torch.tensor([0, 5, 9, 11]), samples=batch.samples
        ),
        "sequence_T disagrees": batch.replace(sequence_T=batch.sequence_T.roll(1)),
        "sequence_T disagrees with": batch.replace(sequence_T=batch.sequence_T.index_fill(0, torch.tensor([1]), 2)),
    }
    for message, candidate in broken.items():
        with pytest.raises(BatchError, match=message):
            check_batch(candidate)


@pytest.mark.parametrize(
    ("prompt", "response", "said"),
    [
        ([1, 12], [3, 13], "token 13 at place 3, one of a response's"),
        ([13, 2], [3, 4], "token 13 at place 0, one of the prompt's"),
        ([1, -1], [3, 4], "token -1 at place 1, one of the prompt's"),
    ],
)
def test_a_token_outside_the_vocabulary_is_refused_with_its_place(
    prompt: list[int], response: list[int], said: str
) -> None:
    check_vocabulary([sample([0, 12], [12])], 13)
    with pytest.raises(BatchError, match=rf"response 5 of group 2: {said}, is none of the model's vocabulary of 13"):
        check_vocabulary([sample([0], [12]), sample(prompt, response, group=2, index=5)], 13)
