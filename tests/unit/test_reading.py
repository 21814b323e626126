"""Responses kept for reading."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from megatron_gspo.algorithm.losses.gspo import gspo
from megatron_gspo.algorithm.packing import pack, shard_tokens
from megatron_gspo.algorithm.ratios import segment_sum
from megatron_gspo.train.batch import Minibatch
from megatron_gspo.train.reading import _measure
from megatron_gspo.types import Sample, Shard, Trained


def sample(group: int) -> Sample:
    ids, zeros = np.array([1, 2], np.int32), np.zeros(2, np.float32)
    return Sample(group, 0, ids, ids, zeros, 1.0, np.ones(2), 0.5)


def test_a_ratio_beyond_what_a_float_holds_is_kept_as_an_infinity() -> None:
    """log s = 1000 and -1000; ``write_rollouts`` makes a null of the first."""
    samples = (sample(0), sample(1))
    batch = pack(samples, loss_dtype=torch.float64)
    old_T = torch.zeros(batch.num_tokens, dtype=torch.float64)
    new_T = torch.where(batch.sequence_T == 0, 1000.0, -1000.0).double()
    shard = replace(shard_tokens(batch, Shard()), old_logprobs_T=old_T)
    output = gspo(shard, new_T, clip_low=3e-4, clip_high=4e-4, sequence_sum=segment_sum)
    groups = SimpleNamespace(token=SimpleNamespace(size=lambda: 1), shard=Shard())
    assert not dist.is_initialized(), "one rank alone gathers nothing"
    minibatch = Minibatch((batch,), (samples,), 8)
    run, trained = SimpleNamespace(groups=groups), Trained(new_T, torch.zeros_like(new_T), output)
    measured = _measure(run, [minibatch], [[shard]], [[trained]], {0, 1})  # type: ignore[arg-type]
    assert (measured[0, 0].ratio, measured[1, 0].ratio) == (math.inf, 0.0)
    assert (measured[0, 0].clipped, measured[1, 0].clipped) == (True, False)
