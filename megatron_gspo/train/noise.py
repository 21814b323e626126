"""The noise floor of log s_i: what a clip range has to stand above.

The same sequences, packed differently, at the same weights: what differs is the order of floating-point sums alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gspo.algorithm.metrics import noise_floor
from megatron_gspo.algorithm.ratios import masked_log_ratio, sequence_log_ratio
from megatron_gspo.batching.packing import shard_tokens
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects
from megatron_gspo.train.assembly import Run
from megatron_gspo.train.batch import Minibatch, pack_on_device
from megatron_gspo.train.passes import needs_old_pass
from megatron_gspo.types import TokenShard


def measure_noise(run: Run, minibatch: Minibatch, outer_step: int) -> dict[str, float]:
    """``noise/*`` of one mini-batch, before it is trained on; empty between measurements. Collective."""
    every = run.config.train.noise_floor_every
    if not every or outer_step % every:
        return {}
    repacked = [part for samples in minibatch.samples for part in (samples[::2][::-1], samples[1::2])]
    batches = [pack_on_device(samples, run.config, run.groups) for samples in repacked]
    means: dict[tuple[int, int], float] = {}
    for batch, (logprobs_T, _) in zip(batches, run.policy.logprobs(batches), strict=False):
        shard = shard_tokens(batch, run.groups.shard)
        means |= _mean_logprobs(run, shard, logprobs_T)
    differences = []
    for shard, old_T in zip(minibatch.shards, _routed_live(run, minibatch, outer_step), strict=True):
        for key, mean in _mean_logprobs(run, shard, old_T).items():
            differences.append(means[key] - mean)
    return _reduce(run, differences)


def _routed_live(run: Run, minibatch: Minibatch, outer_step: int) -> list[torch.Tensor]:
    """Old logprobs of the mini-batch as it is packed, under the routes that the policy chooses for itself."""
    replayed = run.config.replay.mode == "r3"  # the engine's, and the difference would be the engine's
    if replayed or not needs_old_pass(run, outer_step):
        return [logprobs_T for logprobs_T, _ in run.policy.logprobs(minibatch.batches)]
    return [shard.old_logprobs_T for shard in minibatch.shards]


def _mean_logprobs(run: Run, shard: TokenShard, logprobs_T: torch.Tensor) -> dict[tuple[int, int], float]:
    """Mean logprob of each response, over all ranks that hold its tokens: log s_i is a difference of two of them."""
    own_T = masked_log_ratio(logprobs_T.double(), torch.zeros_like(logprobs_T, dtype=torch.float64), shard.mask_T)
    means_S = sequence_log_ratio(own_T, shard.mask_T, shard.sequence_T, shard.num_sequences, run.sequence_sum)
    return {key: mean for key, mean in zip(shard.samples, means_S.tolist(), strict=True) if key != (-1, -1)}


def _reduce(run: Run, differences: Sequence[float]) -> dict[str, float]:
    groups = run.groups
    metrics = None
    if groups.is_last_stage:
        everyone = [value for part in gather_objects(list(differences), groups.data) for value in part]
        metrics = noise_floor(torch.tensor(everyone))
    return broadcast_object(metrics, groups.last_stage_rank, groups.pipeline)
