"""The trainer's time: passes, gradients, optimizer, weights on their way to servers and states on theirs to the
host."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from megatron_gspo.config import ParallelConfig
from megatron_gspo.hf.layout import stage_layers
from megatron_gspo.plan import rates
from megatron_gspo.plan.estimates import NOTHING, Range
from megatron_gspo.plan.flops import forward, training
from megatron_gspo.plan.models import Model
from megatron_gspo.plan.rates import GIGA, TERA, Gpu, Share
from megatron_gspo.plan.serving import Servers, sent_bytes
from megatron_gspo.plan.workload import Workload

ITEM, WIDE = 2, 4
"""Bytes of bfloat16 weights and activations, and of float32 gradients."""


@dataclass(frozen=True)
class Trainer:
    """How the policy lies, and what its backward runs again."""

    parallel: ParallelConfig
    gpus: int
    per_node: int
    microbatch_tokens: int
    recompute: str = "off"
    frozen: bool = False
    """Only adapters are trained."""

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.parallel.data_size(self.gpus)

    def microbatches(self, work: Workload) -> int:
        """Of a mini-batch, on each data-parallel rank, filled with sequences of mean length."""
        tokens = work.tokens / work.minibatches / self.data
        whole = max(1, self.microbatch_tokens // ceil(work.mean_length)) * work.mean_length
        multiple = self.parallel.microbatch_multiple
        return ceil(max(1, ceil(tokens / whole)) / multiple) * multiple

    def off_node(self, ranks: int) -> float:
        """Of a group of so many neighbouring ranks, the share of its members that a rank reaches over the network."""
        return max(0.0, 1 - self.per_node / ranks) if ranks > self.per_node else 0.0


def busy(trainer: Trainer, work: Workload) -> float:
    """Share of a mini-batch's time in which a pipeline stage has work: m / (m + (p - 1) / v) for m micro-batches, p
    stages and v virtual stages a rank (arXiv 2104.04473, 2.2)."""
    parallel, micro = trainer.parallel, trainer.microbatches(work)
    return micro / (micro + (parallel.pipeline - 1) / parallel.virtual_pipeline)


@lru_cache(maxsize=1024)
def balance(model: Model, parallel: ParallelConfig) -> float:
    """Mean over slowest pipeline rank, in operations: the last one has the head besides its layers, and all of a
    pipeline goes at the pace of the slowest."""
    shape, matrices = model.shape, model.matrices
    experts = matrices.experts * matrices.share
    sparse = sum(shape.moe_layers)
    layers = [
        matrices.dense / shape.num_layers + (experts / sparse if is_moe and sparse else 0.0)
        for is_moe in shape.moe_layers
    ]
    ranks = [0.0] * parallel.pipeline
    begin = 0
    for stage, count in enumerate(stage_layers(parallel, shape.num_layers)):
        ranks[stage % parallel.pipeline] += sum(layers[begin : begin + count])
        begin += count
    ranks[-1] += matrices.head
    return sum(ranks) / parallel.pipeline / max(ranks)


def pass_seconds(model: Model, gpu: Gpu, trainer: Trainer, work: Workload, *, backward: bool) -> Range:
    """One pass over an outer step's tokens: forward alone, or forward and backward of all mini-batches.

    operations / (GPUs x peak x share) / (share of time that stages are busy) / (balance of stages) + what goes over
    links + hosts' waiting.
    """
    once = forward(model, work.mean_length, work.square_length)
    operations = training(once, trainer.recompute, frozen=trainer.frozen) if backward else once.total
    best = operations * work.tokens / (trainer.gpus * gpu.tflops * TERA) / busy(trainer, work)
    best /= balance(model, trainer.parallel)
    share = rates.TRAIN_EXPERTS if model.shape.num_experts else rates.TRAIN_DENSE
    relative = Share(1, 1, 1, "") if backward else rates.FORWARD
    again = 0 if trainer.recompute == "off" else 1
    calls = work.minibatches * trainer.microbatches(work) * model.shape.num_layers / trainer.parallel.pipeline
    wait = calls * (3 + again if backward else 1)
    return (
        Range(best / (share.high * relative.high), best / (share.mid * relative.mid), best / (share.low * relative.low))
        + links(model, gpu, trainer, work).times(2 + again if backward else 1)
        + Range(wait * rates.LAYER_S.high, wait * rates.LAYER_S.mid, wait * rates.LAYER_S.low)
    )


def links(model: Model, gpu: Gpu, trainer: Trainer, work: Workload) -> Range:
    """What a forward pass over an outer step's tokens moves between GPUs; a backward moves as much.

    Experts: every routed copy of a token there and back, 2 top_k hidden a layer. Tensor ranks: four gathers or scatters
    of a layer's tokens. Context ranks: keys and values of all others. None of it is taken to overlap with products.
    """
    parallel, shape = trainer.parallel, model.shape
    tokens = work.tokens / (trainer.data * parallel.context)  # of a rank, all its layers' stages together
    layers = shape.num_layers / parallel.pipeline
    sparse = sum(shape.moe_layers) / parallel.pipeline
    row = shape.hidden_size * ITEM
    members = parallel.expert * parallel.expert_tensor
    copies = 2 * shape.top_k * row * sparse * tokens / parallel.tensor * (1 - 1 / members)
    sums = 4 * row * layers * tokens * (1 - 1 / parallel.tensor)
    keys = (
        2 * shape.num_query_groups * shape.head_dim * ITEM * layers * tokens / parallel.tensor * (parallel.context - 1)
    )
    away = trainer.off_node(members)
    away_context = trainer.off_node(parallel.tensor * parallel.context)
    outside = copies * away + keys * away_context
    inside = copies * (1 - away) + sums + keys * (1 - away_context)
    return over(inside, gpu.nvlink_gb, rates.NVLINK) + over(outside, gpu.network_gb, rates.NETWORK)


def over(size: float, gigabytes: float, share: Share) -> Range:
    """Bytes at a rate of which some share is reached."""
    best = size / (gigabytes * GIGA)
    return Range(best / share.high, best / share.mid, best / share.low)


def gradients(gpu: Gpu, trainer: Trainer, work: Workload, dense: int, expert: int, forward_s: Range) -> Range:
    """Float32 gradients of a rank's ``dense`` and ``expert`` elements reduced over their ranks, and new weights
    gathered, once a mini-batch. With ``parallel.overlap`` the reduction hides behind the last micro-batch's backward,
    and the gather behind a forward: what is longer than these remains. ``forward_s``: a pass over the outer step."""
    parallel = trainer.parallel
    replicas = trainer.data * parallel.context
    copies = max(1, parallel.tensor * replicas // (parallel.expert * parallel.expert_tensor))
    apart = trainer.gpus > trainer.per_node
    rate, share = (gpu.network_gb, rates.NETWORK) if apart else (gpu.nvlink_gb, rates.NVLINK)
    elements = dense * (1 - 1 / replicas) + expert * (1 - 1 / copies)
    if parallel.overlap:
        one = forward_s.times(1 / (work.minibatches * trainer.microbatches(work)))
        reduce, gather = over(WIDE * elements, rate, share), over(ITEM * elements, rate, share)
        left = [
            max(0.0, reduce_s - 2 * hidden) + max(0.0, gather_s - hidden)
            for reduce_s, gather_s, hidden in _rows(reduce, gather, one)
        ]
        return Range(*left).times(work.minibatches)
    return over((WIDE + ITEM) * elements, rate, share).times(work.minibatches)


def _rows(*ranges: Range) -> list[tuple[float, ...]]:
    """(low of each, mid of each, high of each)."""
    return list(zip(*((item.low, item.mid, item.high) for item in ranges), strict=True))


def optimizer(gpu: Gpu, work: Workload, states: int, offloaded: bool) -> Range:
    """A step over ``states`` bytes of moments and master weights a rank, once a mini-batch: read and written in its
    memory, or brought from the host and back."""
    moved = 2.0 * states * work.minibatches
    if offloaded:
        return over(moved, gpu.pcie_gb, rates.PCIE)
    return over(moved, gpu.hbm_tb * 1e3, rates.HBM)


def sync(model: Model, servers: Servers) -> Range:
    """All weights to all servers, once an outer step. With LoRA too: adapters are merged into them on the way."""
    size = sent_bytes(model, servers.dtype) / GIGA
    return Range(size / rates.SYNC_GB.high, size / rates.SYNC_GB.mid, size / rates.SYNC_GB.low)


def moving(gpu: Gpu, size: int) -> Range:
    """``size`` bytes a GPU to host memory and back, once an outer step: what makes room for a server there."""
    return over(2.0 * size, gpu.pcie_gb, rates.PCIE) if size else NOTHING
