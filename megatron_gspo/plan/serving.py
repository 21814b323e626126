"""Rollout servers: what they hold, and how long a step's responses take them.

Decoding is bound by memory: each step reads the weights that its batch touches and every sequence's keys and values. Of
E experts, b tokens that choose k each at random touch E (1 - (1 - k / E)^b).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megatron_gspo.config.rollouts import EIGHT_BITS
from megatron_gspo.doctor.served import cache_per_token
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.hf.fp8_model import served_bytes
from megatron_gspo.plan import rates
from megatron_gspo.plan.estimates import Range
from megatron_gspo.plan.flops import forward
from megatron_gspo.plan.models import Model
from megatron_gspo.plan.rates import GIGA, TERA, Gpu
from megatron_gspo.plan.workload import Workload

ITEM = 2
"""Bytes of a bfloat16."""
AT_ONCE = 512
"""Sequences that a server decodes at once at most; ``rollout.concurrency`` keeps as many in flight by default."""
SLICES = 24
"""Of the integral over a response's length."""


@dataclass(frozen=True)
class Servers:
    """Some servers of one size."""

    count: int
    tensor: int
    """GPUs of one, over which its weights and heads are cut."""
    dtype: str = ""
    """``rollout.engine_dtype``: "fp8", or what is counted as bfloat16."""

    @property
    def gpus(self) -> int:
        """Of all of them."""
        return self.count * self.tensor


def weights_per_card(model: Model, servers: Servers) -> int:
    """Bytes of a server's weights on each of its cards."""
    return sent_bytes(model, servers.dtype) // servers.tensor


@lru_cache(maxsize=64)
def sent_bytes(model: Model, dtype: str) -> int:
    """Of all weights, as a sync sends them and a server holds them."""
    return served_bytes(model.family, model.shape, ITEM, eight_bits=dtype == EIGHT_BITS)


def sequences_at_once(room: int, shape: ModelShape, tensor: int, length: float) -> int:
    """Sequences of ``length`` tokens whose keys and values fit into ``room`` bytes of each card."""
    return max(0, int(room / (cache_per_token(shape, tensor) * length)))


def decode_seconds(
    model: Model, gpu: Gpu, servers: Servers, batch: float, context: float, crossing: bool = False
) -> float:
    """One step of a server with ``batch`` sequences of ``context`` tokens each, as expected (see ``rates.DECODE_*``).

    bytes of weights / (share of bandwidth) + bytes of keys and values / (share) + operations / (share of the peak)
    + layers x a constant + sequences x a constant + two sums of the batch's hidden states a layer over the cards.
    ``crossing``: these are on several nodes. Of eight bits fewer bytes are read; operations are taken to be as slow.
    """
    shape, matrices, tensor = model.shape, model.matrices, servers.tensor
    missed = (1 - matrices.share) ** batch
    item = 1 if servers.dtype == EIGHT_BITS else ITEM
    read = (item * (matrices.dense + matrices.experts * (1 - missed)) + ITEM * matrices.head) / tensor
    cache = cache_per_token(shape, tensor) * context * batch
    seconds = read / (rates.DECODE_WEIGHTS * gpu.hbm_tb * TERA) + cache / (rates.DECODE_CACHE * gpu.hbm_tb * TERA)
    seconds += 2.0 * matrices.active * batch / tensor / (rates.DECODE_FLOPS * gpu.tflops * TERA)
    seconds += shape.num_layers * rates.DECODE_LAYER_S + batch * rates.DECODE_SEQUENCE_S
    sums = 2 * shape.num_layers * batch * shape.hidden_size * ITEM
    rate = rates.NETWORK.mid * gpu.network_gb if crossing else rates.NVLINK.mid * gpu.nvlink_gb
    return seconds + 2 * (1 - 1 / tensor) * sums / (rate * GIGA)


@lru_cache(maxsize=4096)
def rollout_seconds(model: Model, gpu: Gpu, servers: Servers, work: Workload, at_once: int, crossing: bool) -> Range:
    """All responses of an outer step: prompts once a group, then tokens.

    A server has its share of the sequences, ``at_once`` of them at a time. While others wait, it runs full; then the
    last ones end one after another, and the step ends with the longest: the sum over its tokens of a step with what is
    still running (``Workload.running``).
    """
    share = work.sequences / servers.count
    batch = min(share, at_once, AT_ONCE)
    context = work.mean_prompt + work.mean_response / 2
    full = (share - batch) * work.mean_response / batch
    seconds = full * decode_seconds(model, gpu, servers, batch, context, crossing)
    width = work.response_tokens / SLICES
    for number in range(SLICES):
        token = (number + 0.5) * width
        left = max(1.0, batch * work.running(token))
        seconds += width * decode_seconds(model, gpu, servers, left, work.mean_prompt + token, crossing)
    return spread(gpu, seconds) + prefill_seconds(model, gpu, servers, work)


def spread(gpu: Gpu, seconds: float) -> Range:
    """Of decoding that is expected to take so long."""
    share = rates.DECODE if gpu.name == rates.FITTED_ON else rates.DECODE_ELSEWHERE
    return Range(seconds * share.low, seconds * share.mid, seconds * share.high)


def prefill_seconds(model: Model, gpu: Gpu, servers: Servers, work: Workload) -> Range:
    """Every prompt once: the other responses of its group find it in the cache."""
    operations = work.prompts * work.mean_prompt * forward(model, work.mean_prompt).total
    best = operations / (servers.gpus * gpu.tflops * TERA)
    return Range(best / rates.PREFILL.high, best / rates.PREFILL.mid, best / rates.PREFILL.low)
