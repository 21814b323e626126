"""One rank's share of a step on fake tensors: pi_old, forward and backward, the optimizer, the weights for a sync."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_gspo.batching.packing import pack
from megatron_gspo.config import RunConfig
from megatron_gspo.doctor.estimate import longest_sequence, microbatches, tokens_of_microbatch
from megatron_gspo.dryrun.meter import Meter
from megatron_gspo.dryrun.result import Collectives, Moment, Peak, Rank
from megatron_gspo.dryrun.standins import replace
from megatron_gspo.hf.critic import critic_of
from megatron_gspo.hf.family import Family, ModelShape
from megatron_gspo.megatron import critic as critics
from megatron_gspo.megatron import policy as policies
from megatron_gspo.megatron.groups import Groups, make_groups
from megatron_gspo.sync.base import CARD_BUCKET_MB
from megatron_gspo.types import DTYPES, PackedBatch, Sample

PER_STEP = ("data_context", "expert_data")
"""Groups over which gradients and weights meet once a step, and not in every micro-batch."""


class DryPolicy(policies.Policy):
    """A policy of a shape that is given, without weights to read."""

    def _load(self, directory: Path) -> None:
        """There are none."""


class DryCritic(critics.Critic):
    """A critic without weights to read."""

    def _load(self, directory: Path) -> None:
        """There are none."""


@contextmanager
def world(rank: int, size: int) -> Iterator[None]:
    """A process group of ``size`` ranks of which this process is one and nobody the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_rank(config: RunConfig, model: tuple[Family, ModelShape], meter: Meter, *, stage: int, size: int) -> Rank:
    """What a rank of ``stage`` does of a model in a world of ``size`` ranks. ``standins`` are installed."""
    replace(policies, read_model=lambda _: model)
    replace(critics, read_critic=lambda _: (critic_of(model[0]), model[1]))
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with world(stage * (size // config.parallel.pipeline), size):
        groups = make_groups(config.parallel)
        with fake, meter:
            _step(config, groups, fake, meter)
        names = _names(groups)
        data = groups.data_size
        del groups
    gc.collect()
    return _result(config, meter, names, data)


def _step(config: RunConfig, groups: Groups, fake: FakeTensorMode, meter: Meter) -> None:
    policy = _build(config, groups, meter)
    batches = [_batch(config, groups, fake)] * _enough(config, groups)
    meter.microbatches = len(batches)
    with meter.at(part=""):
        with meter.at(phase="pi_old", site="layers"):
            policy.logprobs(batches[: config.parallel.microbatch_multiple])
        with meter.at(phase="train", site="layers"):
            policy.gradients(batches, lambda index, logprobs, entropy: logprobs.sum())
        with meter.at(phase="optimizer", site="step", part="passing"):
            policy.step(0, 10)
        with meter.at(phase="sync", site="gather", part="passing"):
            _stream(policy, (config.sync.bucket_mb or CARD_BUCKET_MB) * 1_000_000)


def _build(config: RunConfig, groups: Groups, meter: Meter) -> policies.Policy:
    with meter.at(phase="start"):
        policy = DryPolicy(config, groups)
        parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
        meter.belongs(parameters, "weights")
        meter.belongs([p.main_grad for p in parameters if hasattr(p, "main_grad")], "gradients")
        assert policy.optimizer is not None
        states = [state for part in policy.optimizer.parts() for state in part.optimizer.state.values()]
        if not config.optimizer.offload:
            own = {parameter.untyped_storage()._cdata for parameter in parameters}
            tensors = [tensor for state in states for tensor in state.values()]
            meter.belongs([t for t in tensors if t.untyped_storage()._cdata not in own], "optimizer")
        with meter.at(part="reference"):
            apart = config.algorithm.uses_reference and not config.reference_is_base
            policy.reference = DryPolicy(config, groups, trainable=False) if apart else None  # type: ignore[attr-defined]
        with meter.at(part="critic"):
            policy.critic = DryCritic(config, groups) if config.algorithm.uses_critic else None  # type: ignore[attr-defined]
    _watch(policy, meter)
    return policy


def _watch(policy: policies.Policy, meter: Meter) -> None:
    """Names the backward of the embedding, the last of a micro-batch."""

    def reached(_: Any) -> None:
        meter.site = "embedding"

    def forward(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(reached)

    def begins(*_: Any) -> None:
        meter.site = "layers"

    for chunk in policy.chunks:
        chunk.register_forward_pre_hook(begins)
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(forward)


def _enough(config: RunConfig, groups: Groups) -> int:
    """Micro-batches until no more come into flight: one a later stage; virtual stages take two rounds."""
    parallel = config.parallel
    wanted = 2 * parallel.pipeline if parallel.virtual_pipeline > 1 else parallel.pipeline - groups.pipeline.rank()
    return max(1, min(wanted, microbatches(config, groups.data_size)))


def _batch(config: RunConfig, groups: Groups, fake: FakeTensorMode) -> PackedBatch:
    """Sequences as long as they may be, as many as a micro-batch holds, or a part of one."""
    tokens = tokens_of_microbatch(config, groups.data_size)
    longest = min(longest_sequence(config), tokens)
    prompt = min(config.rollout.max_prompt_tokens, longest - 1)
    with unset_fake_temporarily():
        samples = [_sample(i, prompt, longest - prompt) for i in range(max(1, tokens // longest))]
        batch = pack(
            samples,
            loss_dtype=torch.promote_types(DTYPES[config.model.dtype], torch.float32),
            tensor=groups.tensor.size(),
            context=groups.context.size(),
        )
    return batch.map(fake.from_tensor)


def _sample(index: int, prompt: int, response: int) -> Any:
    zeros = np.zeros(response, np.float32)
    return Sample.of_response(
        np.zeros(prompt, np.int32),
        np.zeros(response, np.int32),
        group=index,
        sample=0,
        rollout_logprobs=zeros,
        advantage=0.0,
        token_advantages=zeros.astype(np.float64),
    ).placed(1.0)


def _stream(policy: policies.Policy, limit: int) -> None:
    """Weights as a sync takes them, a bucket at a time."""
    bucket: list[torch.Tensor] = []
    for _, tensor in policy.weights(copies=False):
        bucket.append(tensor)
        if sum(each.nbytes for each in bucket) > limit:
            bucket.clear()


def _names(groups: Groups) -> dict[str, str]:
    """A group's own name -> what it is; of several that are the same ranks, the first."""
    named = {name: group for name, group in vars(groups).items() if isinstance(group, dist.ProcessGroup)}
    named |= {name: group for name, group in vars(groups.megatron).items() if isinstance(group, dist.ProcessGroup)}
    return {group.group_name: name for name, group in reversed(named.items())}


def _result(config: RunConfig, meter: Meter, names: dict[str, str], data: int) -> Rank:
    """With the micro-batches of a step: what each does, and what once a step."""
    parallel, total = config.parallel, microbatches(config, data)
    host = float(meter.host)
    ran = {"pi_old": parallel.microbatch_multiple, "train": meter.microbatches}
    found: dict[tuple[str, str], list[float]] = {}
    for (phase, kind, group), (count, size) in meter.collectives.items():
        name = names.get(group, group)
        scale = total / ran[phase] if phase in ran and name not in PER_STEP else 1.0
        entry = found.setdefault((kind, name), [0.0, 0.0])
        entry[0] += scale * count
        entry[1] += scale * size
    return Rank(
        peaks={
            Moment(*moment): Peak({part: float(size) for part, size in parts.items()}, Moment(*moment), host)
            for moment, (_, parts) in meter.peaks.items()
        },
        collectives=tuple(Collectives(kind, group, *numbers) for (kind, group), numbers in sorted(found.items())),
        flops=sum(total / ran[phase] * flops for phase, flops in meter.flops.items() if phase in ran),
        host=host,
    )
