"""A column is declared once: packing, cutting, dummies, checks and moving follow from its declaration."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch

from megatron_gspo.batching.packing import check_batch, dummy_batch, pack, shard_tokens, unshard_tokens
from megatron_gspo.errors import BatchError
from megatron_gspo.types import (
    Axis,
    Column,
    Columns,
    PlacedSample,
    Shard,
    TokenShard,
    access,
    batches,
    columns,
    losses,
    packed_columns,
    reports,
    rollouts,
    routes,
)

AGES = Column("ages_T", Axis.INPUT, torch.int64, "outer steps since a token was drawn", of=lambda s: s.token_ids % 3)
DOUBTS = Column("doubts_T", Axis.PREDICTION, torch.float32, "one a trained token", of=lambda s: -s.rollout_logprobs)
RANKS = Column("ranks_S", Axis.SEQUENCE, None, "one a response", of=lambda s: s.sample + 0.5)
OURS = (AGES, DOUBTS, RANKS)


def sample(length: int, trained: list[int], index: int = 0) -> PlacedSample:
    mask = np.isin(np.arange(length), trained)
    values = np.arange(1, len(trained) + 1)
    return PlacedSample(
        group=0,
        sample=index,
        token_ids=np.arange(10, 10 + length, dtype=np.int32),
        trained=mask,
        rollout_logprobs=-values.astype(np.float32),
        advantage=1.0,
        token_advantages=values / 4,
        weight=0.5,
    )


TWO = [sample(7, [2, 3, 6]), sample(4, [1, 3], index=1)]


def test_trained_tokens_may_lie_anywhere_behind_the_first() -> None:
    """Between the policy's own tokens are an environment's: their positions are masked, and lengths do not count."""
    batch = pack(TWO, loss_dtype=torch.float64)
    check_batch(batch)
    assert batch.mask_T.int().tolist() == [0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0]
    assert batch.labels_T[batch.mask_T].tolist() == [12, 13, 16, 11, 13]
    assert batch.rollout_logprobs_T.tolist() == [0, -1, -2, 0, 0, -3, 0, -1, 0, -2, 0]
    assert batch.advantages_T.tolist() == [0, 0.25, 0.5, 0, 0, 0.75, 0, 0.25, 0, 0.5, 0]
    assert batch.lengths_S.tolist() == [3, 2]
    assert [s.predicting.tolist() for s in TWO] == [[1, 2, 5], [0, 2]]


def test_a_column_of_ones_own_is_packed_cut_checked_and_in_dummies() -> None:
    batch = pack(TWO, loss_dtype=torch.float64, tensor=2, context=2, columns=OURS)
    check_batch(batch)
    assert batch[RANKS].tolist() == [0.5, 1.5] and batch[RANKS].dtype == torch.float64
    assert torch.equal(batch[DOUBTS], -batch.rollout_logprobs_T)
    inside = batch.sequence_T < batch.num_sequences
    assert torch.equal(batch[AGES][inside], batch.tokens_T[inside] % 3) and not batch[AGES][~inside].any()
    places = [Shard(t, 2, c, 2) for c in range(2) for t in range(2)]
    shards = [shard_tokens(batch, place) for place in places]
    for column in (AGES, DOUBTS):
        whole = unshard_tokens([shard[column] for shard in shards], batch.cu_seqlens, places[0])
        assert torch.equal(whole, batch[column])
    assert all(torch.equal(shard[RANKS], batch[RANKS]) for shard in shards)
    dummy = dummy_batch(torch.float64, tensor=2, columns=OURS)
    check_batch(dummy)
    assert not dummy[AGES].any() and dummy[RANKS].tolist() == [0.0]
    assert (
        set(dict(batch))
        == set(dict(dummy))
        == {*packed_columns(), *OURS}
        | {
            Columns.tokens_T,
            Columns.labels_T,
            Columns.mask_T,
            Columns.sequence_T,
        }
    )
    with pytest.raises(BatchError, match=rf"ages_T has 3 entries for {batch.num_tokens} tokens"):
        check_batch(batch | {AGES: torch.zeros(3)})


def test_a_column_that_no_pass_has_made_says_which_one_does() -> None:
    shard = shard_tokens(pack(TWO, loss_dtype=torch.float64), Shard())
    with pytest.raises(BatchError, match=r"no old_logprobs_T \(log pi_old\): run the pi_old pass first"):
        _ = shard.old_logprobs_T
    made = shard | {TokenShard.old_logprobs_T: torch.zeros(11)}
    assert made.old_logprobs_T.tolist() == [0.0] * 11 and TokenShard.old_logprobs_T not in shard
    assert TokenShard.old_logprobs_T not in made.replace(old_logprobs_T=None)


def test_a_name_that_nobody_has_declared_is_an_error_at_once() -> None:
    shard = shard_tokens(pack(TWO, loss_dtype=torch.float64), Shard())
    with pytest.raises(AttributeError, match="old_logprob_T"):
        _ = shard.old_logprob_T  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="old_logprob_T"):
        shard.replace(old_logprob_T=torch.zeros(11))
    with pytest.raises(AttributeError, match="columns do not change"):
        shard.old_logprobs_T = torch.zeros(11)
    with pytest.raises(BatchError, match="has the suffix _S"):
        Column("ages_T", Axis.SEQUENCE, None, "an age")


def test_columns_are_moved_by_one_function() -> None:
    batch = pack(TWO, loss_dtype=torch.float64, columns=OURS)
    moved = batch.to("meta")
    assert {values.device.type for _, values in moved} == {"meta"} == {moved.cu_seqlens.device.type}
    assert moved.samples == batch.samples


@pytest.mark.parametrize("module", [access, batches, columns, losses, reports, rollouts, routes])
def test_the_examples_of_the_types_hold(module) -> None:  # type: ignore[no-untyped-def]
    done = doctest.testmod(module, extraglobs={"np": np, "torch": torch})
    assert done.failed == 0
