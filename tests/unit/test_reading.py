"""Responses kept for reading."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from megatron_gspo.algorithm.base import make_algorithm
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.batching.packing import pack, shard_tokens
from megatron_gspo.train.batch import Minibatch
from megatron_gspo.train.reading import _measure
from megatron_gspo.types import PlacedSample, Shard, Trained


def sample(group: int) -> PlacedSample:
    ids = np.array([1, 2])
    rest = {"rollout_logprobs": np.zeros(2), "advantage": 1.0, "token_advantages": np.ones(2), "weight": 0.5}
    return PlacedSample.of_response(ids, ids, group=group, sample=0, **rest)


def test_a_ratio_beyond_what_a_float_holds_is_kept_as_an_infinity() -> None:
    """log s = 1000 and -1000; ``write_rollouts`` makes a null of the first."""
    samples = (sample(0), sample(1))
    batch = pack(samples, loss_dtype=torch.float64)
    old_T = torch.zeros(batch.num_tokens, dtype=torch.float64)
    new_T = torch.where(batch.sequence_T == 0, 1000.0, -1000.0).double()
    shard = shard_tokens(batch, Shard()).replace(old_logprobs_T=old_T)
    output = make_algorithm("gspo").loss(shard, new_T, segment_sum)
    groups = SimpleNamespace(token=SimpleNamespace(size=lambda: 1), shard=Shard())
    assert not dist.is_initialized(), "one rank alone gathers nothing"
    trained = Trained(new_T, torch.zeros_like(new_T), output)
    minibatch = Minibatch((batch,), (samples,), 8, shards=(shard,), trained=(trained,))
    measured = _measure(SimpleNamespace(groups=groups), [minibatch], {0, 1})  # type: ignore[arg-type]
    assert (measured[0, 0].ratio, measured[1, 0].ratio) == (math.inf, 0.0)
    assert (measured[0, 0].clipped, measured[1, 0].clipped) == (True, False)
