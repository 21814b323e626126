"""Layouts and server sizes that are legal, before anybody asks whether they fit."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

from megatron_gspo.batching.planning import padded_length
from megatron_gspo.config import ParallelConfig
from megatron_gspo.config.servers import server_sizes
from megatron_gspo.errors import ConfigError, LayoutError
from megatron_gspo.hf.fp8_model import misfits
from megatron_gspo.hf.layout import check_layout
from megatron_gspo.plan.models import Model
from megatron_gspo.plan.serving import Servers
from megatron_gspo.plan.settings import Choice, Request
from megatron_gspo.rollout.sglang.cards import check_divides

CONTEXTS = (1, 2, 4, 8)
LONG = 16_384
"""Tokens of the longest sequence above which context parallelism is tried."""
PACKS = (1, 2, 4)
"""Budgets of a micro-batch, in longest sequences; never below ``FEWEST`` tokens."""
FEWEST = 4096


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``."""
    return [2**n for n in range(most.bit_length()) if 2**n <= most]


def floor(model: Model, parallel: ParallelConfig, lora: int) -> int:
    """Bytes that a rank's weights and float32 gradients take at least: a bound that takes no time to work out."""
    matrices = model.matrices
    elements = (
        matrices.dense / parallel.tensor + matrices.experts / (parallel.expert * parallel.expert_tensor)
    ) / parallel.pipeline
    return int(elements * (2 if lora else 6))


def divisors(number: int) -> list[int]:
    """All of them."""
    return [size for size in range(1, number + 1) if number % size == 0]


def layouts(model: Model, gpus: int, request: Request) -> Iterator[ParallelConfig]:
    """Every layout on ``gpus`` ranks that the configuration and the model allow.

    Tensor ranks stay within a node; pipelines, where they are cut, are also tried with virtual stages; an expert is cut
    (``expert_tensor``) only where each rank has one already, as Mixtral's eight are soon.
    """
    shape = model.shape
    longest = request.work.longest
    contexts = CONTEXTS if longest > LONG else (1,)
    experts = divisors(shape.num_experts) if shape.num_experts else [1]
    tensors = [size for size in powers(request.per_node) if size <= gpus]
    pipelines = [size for size in divisors(gpus) if size <= min(shape.num_layers, 16)]
    for tensor, pipeline, context, expert in product(tensors, pipelines, contexts, experts):
        ranks = tensor * pipeline * context
        if gpus % ranks or gpus // pipeline % expert:
            continue
        widths = (1, 2, 4) if 1 < expert == shape.num_experts else (1,)
        for virtual, width in product((1, 2, 4) if pipeline > 1 else (1,), widths):
            if pipeline * virtual > shape.num_layers or gpus // pipeline % (expert * width):
                continue
            sizes: dict[str, Any] = {
                "tensor": tensor,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "context": context,
            }
            sizes |= {"expert": expert, "expert_tensor": width, "data": gpus // ranks}
            parallel = ParallelConfig(**sizes, stage_layers=balanced(model, pipeline * virtual))
            try:
                check_layout(parallel, shape)
            except LayoutError:
                continue
            yield parallel


def balanced(model: Model, stages: int) -> tuple[int, ...] | None:
    """Layers of each virtual stage when the last one has as many fewer as the head is worth, and one at least; None
    where the default is as good."""
    shape, matrices = model.shape, model.matrices
    head = matrices.head / ((matrices.active - matrices.head) / shape.num_layers)
    last = max(1, round((shape.num_layers + head) / stages - head))
    if stages == 1 or shape.num_layers < stages or last >= shape.num_layers // stages:
        return None
    share, more = divmod(shape.num_layers - last, stages - 1)
    return (*(share + (stage < more) for stage in range(stages - 1)), last)


def server_tensors(model: Model, request: Request) -> list[int]:
    """GPUs that one server may have: sizes that divide the model, within a node, or over two where one does not hold
    the weights. Raises ConfigError for a model that no server takes in eight bits."""
    sizes, family, shape = [], model.family, model.shape
    if request.engine_dtype and (wrong := misfits(family, shape, attention=1, dense=1, experts=1)):
        raise ConfigError(f"--fp8-rollouts needs matrices of whole blocks of 128, and {', '.join(wrong)}: leave it out")
    for tensor in powers(2 * request.per_node):
        try:
            check_divides(server_sizes(["--tp-size", str(tensor)]), model.config)
        except ConfigError:
            continue
        if request.engine_dtype and misfits(family, shape, attention=tensor, dense=tensor, experts=tensor):
            continue
        sizes.append(tensor)
    return [size for size in sizes if size <= request.per_node] or sizes


def splits(request: Request) -> Iterator[tuple[int, int, bool]]:
    """(GPUs of the trainer, GPUs of servers, whether they are the same ones)."""
    if request.placement in ("auto", "colocated"):
        yield request.gpus, request.gpus, True
    if request.placement in ("auto", "apart"):
        if request.gpus <= request.per_node:
            parts = powers(request.gpus - 1)
        else:
            nodes = request.gpus // request.per_node
            parts = sorted({max(1, nodes * eighths // 8) * request.per_node for eighths in (1, 2, 3, 4, 6)})
        for servers in parts:
            trainer = request.gpus - servers
            if trainer in powers(trainer) or trainer % request.per_node == 0:
                yield trainer, servers, False


def fleets(model: Model, gpus: int, request: Request) -> Iterator[Servers]:
    """Servers of one size that take all of ``gpus``."""
    for tensor in server_tensors(model, request):
        if gpus % tensor == 0:
            yield Servers(gpus // tensor, tensor, request.engine_dtype)


def variants(parallel: ParallelConfig, gpus: int, colocated: bool, request: Request) -> list[Choice]:
    """What memory can be traded for time with; the leanest of each kind of states is the last. Servers are chosen
    later."""
    longest = padded_length(request.work.longest, parallel.context)
    budgets = sorted({max(FEWEST * parallel.context, longest * pack) for pack in PACKS}, reverse=True)
    narrow = ("float32", "bfloat16") if request.narrow else ("float32",)
    none = Servers(1, 1)
    return [
        Choice(parallel, gpus, none, colocated, max(budget, longest), recompute, offload, dtype, request.lora)
        for dtype, offload, recompute, budget in product(narrow, (False, True), ("off", "selective", "full"), budgets)
    ]
