"""Which tokens Clip-Cov and KL-Cov choose, against sorting all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.covariance import drawn_numbers
from megatron_gspo.batching.packing import pack, shard_tokens
from megatron_gspo.parity.case import Case, random_samples
from megatron_gspo.parity.objectives import naive_choice, naive_draw
from megatron_gspo.types import Shard, TokenShard


@dataclass(frozen=True)
class Alone:
    """``Totals`` of one process."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def nth_largest(self, values: torch.Tensor, n: int) -> float:
        return float(values.topk(n).values[-1]) if n <= values.numel() else -float("inf")


def shards_of(case: Case, parts: list[list[int]]) -> list[TokenShard]:
    shards = []
    for part in parts:
        batch = pack([case.samples[index].placed(0.1) for index in part], loss_dtype=torch.float64)
        old_T = torch.full((batch.num_tokens,), float("nan"), dtype=torch.float64)
        old_T[batch.mask_T] = torch.from_numpy(np.concatenate([case.old[index] for index in part]))
        shards.append(shard_tokens(batch, Shard()).replace(old_logprobs_T=old_T))
    return shards


@pytest.fixture(params=["clip-cov", "kl-cov"])
def case(request: pytest.FixtureRequest) -> Case:
    samples, rng = random_samples(67, 3), np.random.default_rng(0)
    case = Case("", samples, loss=request.param)
    case.__dict__["old"] = {index: rng.normal(-3, 1, sample.num_trained) for index, sample in enumerate(samples)}
    return case


@pytest.mark.parametrize("share", [1e-4, 0.05, 0.3])
def test_the_chosen_tokens_are_those_of_the_definition_however_they_are_packed(case: Case, share: float) -> None:
    algorithm = make_algorithm(case.loss, share=share)
    case.__dict__["algorithm"] = algorithm
    members = case.minibatches[0]
    expected = naive_choice(case, members)
    assert sum(map(sum, expected.values())) >= 1
    for parts in ([members], [members[:2], members[2:]], [[index] for index in reversed(members)]):
        prepared = algorithm.prepare(shards_of(case, parts), Alone())
        found = {}
        for part, shard in zip(parts, prepared, strict=True):
            for index, own in zip(part, shard.lengths_S.tolist(), strict=True):
                assert own == case.samples[index].num_trained
            for position, index in enumerate(part):
                own_T = shard.mask_T & (shard.sequence_T == position)
                found[index] = shard.chosen_T[own_T].tolist()
            assert not shard.chosen_T[~shard.mask_T].any()
        assert found == expected


def test_draws_are_those_of_splitmix64_and_spread_evenly() -> None:
    samples = random_samples(67, 1)
    case = Case("", samples)
    batch = pack([sample.placed(0.1) for sample in samples], loss_dtype=torch.float64)
    drawn = drawn_numbers(shard_tokens(batch, Shard())).tolist()
    expected = [
        naive_draw(*key, int(place))
        for key, sample in zip(case.keys, samples, strict=True)
        for place in sample.predicting
    ]
    assert drawn == expected
    assert 0.4 < np.mean(drawn) < 0.6 and len(set(drawn)) == len(drawn)


def test_a_rank_without_a_micro_batch_has_nothing_to_prepare() -> None:
    assert make_algorithm("kl-cov").prepare([], Alone()) == []
