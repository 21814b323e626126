"""Packing: alignment, padding, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.algorithm.packing import check_batch, dummy_batch, pack, shard_tokens
from megatron_gspo.errors import BatchError
from megatron_gspo.types import Sample


def sample(prompt: list[int], response: list[int], group: int = 0, index: int = 0) -> Sample:
    size = len(response)
    return Sample(
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
    batch = pack(TWO, multiple=4, loss_dtype=torch.float32)
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
    batch = pack(TWO, multiple=3, loss_dtype=torch.float64)
    assert batch.cu_seqlens.tolist() == [0, 5, 9]
    assert batch.num_tokens == 9


shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=8)


@given(shapes=shapes, multiple=st.integers(1, 16), seed=st.integers(0, 100))
@settings(deadline=None)
def test_every_response_can_be_read_back_from_where_it_is_predicted(
    shapes: list[tuple[int, int]], multiple: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    samples = [sample(rng.integers(0, 99, n).tolist(), rng.integers(0, 99, r).tolist()) for n, r in shapes]
    batch = pack(samples, multiple=multiple, loss_dtype=torch.float64)
    check_batch(batch)
    assert batch.num_tokens % multiple == 0
    assert batch.num_tokens - sum(s.length for s in samples) < multiple
    for i, s in enumerate(samples):
        own = batch.mask_T & (batch.sequence_T == i)
        assert batch.labels_T[own].tolist() == s.response_ids.tolist()
        assert batch.rollout_logprobs_T[own].tolist() == s.rollout_logprobs.tolist()
        assert batch.advantages_T[own].tolist() == s.token_advantages.tolist()
        first, last = batch.cu_seqlens[i].item(), batch.cu_seqlens[i + 1].item()
        assert batch.tokens_T[first:last].tolist() == [*s.prompt_ids, *s.response_ids]
        assert own.nonzero().flatten().tolist() == list(range(first + len(s.prompt_ids) - 1, last - 1))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_laid_end_to_end_are_the_batch(count: int) -> None:
    batch = pack(TWO, multiple=4, loss_dtype=torch.float64)
    shards = [shard_tokens(batch, index, count) for index in range(count)]
    for name in ("labels_T", "mask_T", "sequence_T", "rollout_logprobs_T", "advantages_T"):
        assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(batch, name)), name
    for shard in shards:
        assert torch.equal(shard.lengths_S, batch.lengths_S)
        assert torch.equal(shard.advantages_S, batch.advantages_S)
        assert torch.equal(shard.weights_S, batch.weights_S)
        assert shard.samples == batch.samples


def test_tokens_that_do_not_divide_are_not_sharded() -> None:
    with pytest.raises(BatchError, match="9 tokens do not divide among 2 ranks"):
        shard_tokens(pack(TWO, multiple=3, loss_dtype=torch.float64), 0, 2)


def test_a_dummy_has_one_sequence_of_weight_zero_and_nothing_to_learn() -> None:
    batch = dummy_batch(8, torch.float64)
    check_batch(batch)
    assert (batch.num_tokens, batch.num_sequences) == (8, 1)
    assert batch.samples == ((-1, -1),)
    assert batch.cu_seqlens.tolist() == [0, 8]
    assert not batch.mask_T.any()
    assert batch.weights_S.tolist() == [0.0]


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
        pack([TWO[0], replace(broken, group=3, sample=5)], multiple=1, loss_dtype=torch.float64)


def test_packing_nothing_is_refused() -> None:
    with pytest.raises(BatchError, match="at least one sample"):
        pack([], multiple=1, loss_dtype=torch.float64)


def test_check_batch_finds_what_does_not_add_up() -> None:
    batch = pack(TWO, multiple=4, loss_dtype=torch.float64)
    check_batch(batch)
    in_padding, one_more = batch.mask_T.clone(), batch.mask_T.clone()
    in_padding[-1] = one_more[0] = True
    broken = {
        r"response \(0, 0\) has 3 positions in the mask and a length of 2": replace(batch, mask_T=one_more),
        r"response \(1, 2\) has 3 positions in the mask and a length of 4": replace(
            batch, lengths_S=torch.tensor([2, 4])
        ),
        "1 padding positions": replace(batch, mask_T=in_padding),
        "labels_T has 11 entries for 12 tokens": replace(batch, labels_T=batch.labels_T[1:]),
        "weights_S has 1 entries for 2 sequences": replace(batch, weights_S=batch.weights_S[1:]),
        "does not cut 12 tokens into 2": replace(batch, cu_seqlens=torch.tensor([0, 5, 9, 11])),
        "sequence_T disagrees": replace(batch, sequence_T=batch.sequence_T.roll(1)),
    }
    for message, candidate in broken.items():
        with pytest.raises(BatchError, match=message):
            check_batch(candidate)
