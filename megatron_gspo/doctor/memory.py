"""Check of the memory that a run will take on this machine."""

from __future__ import annotations

from dataclasses import replace

from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.estimate import ITEM_BYTES, Estimate, worst_stage
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.machine import gib
from megatron_gspo.report.text import count
from megatron_gspo.rollout.sglang.launcher import GPU_SHARE, cpu_cache_tokens

TIGHT = 0.85
"""Share of the free memory above which an estimate is too near to it."""
RANK_PROCESS = 400 * 2**20
"""Resident bytes of a rank on a CPU before it has a model: Python, torch, Megatron."""
HEAP = 1.4
"""Resident bytes of a rank on a CPU over the estimate: temporaries, buffers of gloo, and freed pieces that stay with
the allocator. Measured with a 194 MiB model on one and two ranks: 1.1 to 1.4, and 1.55 in bfloat16."""
SERVER_PROCESS = 2 * 2**30
"""Resident bytes of a local CPU server's three processes without a model."""


def check_memory(facts: Facts) -> Check:
    """The sum for the fullest rank, and all ranks and servers of this machine against what is free."""
    _, needed = worst_stage(facts.config, facts.shape, facts.tensors, facts.layout)
    rank_text = f"a rank: {spell(needed)}"
    if facts.machine.gpus:
        return _on_gpus(facts, needed, rank_text)
    copies = needed.weights + needed.optimizer if facts.config.train.checkpoint_async else 0
    rank = int(RANK_PROCESS + HEAP * needed.total) + copies
    servers, ranks = facts.local_servers, facts.ranks_per_node
    server = _server_bytes(facts) if servers else 0
    total, free = ranks * rank + servers * server, facts.machine.free_memory
    text = f"{rank_text}; resident x {HEAP:g} + {gib(RANK_PROCESS)} of process"
    text += f" + {gib(copies)} of copies (train.checkpoint_async)" * bool(copies) + f" = {gib(rank)}"
    text += f"; {'on each node ' if facts.nodes > 1 else ''}{count(ranks, 'rank')} x {gib(rank)}"
    if servers:
        text += f" + {count(servers, 'server')} x {gib(server)}"
    fix = _most(needed, ranks * rank, servers * server)
    return _against(f"{text} = {gib(total)} of {gib(free)} free", total, free, fix)


def spell(needed: Estimate) -> str:
    """ "weights 1.2 GiB + gradients 2.4 GiB + ... = 9 GiB", the terms that are zero left out."""
    terms = " + ".join(f"{name} {gib(size)}" for name, size in vars(needed).items() if size)
    return f"{terms} = {gib(needed.total)}"


def _on_gpus(facts: Facts, needed: Estimate, rank_text: str) -> Check:
    """The fullest rank against the fullest of the devices that ranks of this machine use."""
    devices = facts.machine.gpus[: facts.ranks_per_node]
    servers = facts.local_servers
    free = min(free - (int(GPU_SHARE * total) if index < servers else 0) for index, (free, total) in enumerate(devices))
    shared = f", {GPU_SHARE:.0%} of it a local server's" if servers else ""
    text = f"{rank_text}, without context and NCCL buffers, of {gib(free)} free on the fullest GPU{shared}"
    there = replace(needed, optimizer=0) if facts.config.optimizer.offload else needed
    text += f"; of it, {gib(needed.optimizer)} in host memory (optimizer.offload)" * (there is not needed)
    return _against(text, there.total, free, _largest(there))


def _against(text: str, needed: int, free: int, fix: str) -> Check:
    if needed > free:
        return error(text, fix)
    if needed > TIGHT * free:
        return warning(f"{text}: more than {TIGHT:.0%}", fix)
    return ok(text)


def _server_bytes(facts: Facts) -> int:
    """A local CPU server: process, weights, and the cache of keys and values that ``server_arguments`` asks for."""
    config, shape = facts.config, facts.shape
    item = min(4, ITEM_BYTES[config.model.dtype])
    weights = sum(tensor.local_size(1, 1) for tensor in facts.tensors) * item
    cache = cpu_cache_tokens(config.rollout) * shape.num_layers * 2 * shape.num_query_groups * shape.head_dim * item
    return SERVER_PROCESS + weights + cache


def _most(needed: Estimate, ranks: int, servers: int) -> str:
    """What makes the larger part smaller: the servers', the ranks' processes, or what each rank holds."""
    if servers > ranks:
        return "local servers are most of it: fewer rollout.local_servers, or named ones in rollout.servers"
    if HEAP * needed.total < RANK_PROCESS:
        return "ranks' processes are most of it: fewer ranks, by parallel.tensor, pipeline, context or data"
    return _largest(needed)


def _largest(needed: Estimate) -> str:
    """What makes the largest term smaller."""
    fixes = {
        "weights": "parallel.tensor, pipeline or expert; model.dtype",
        "gradients": "parallel.tensor, pipeline or expert",
        "optimizer": 'parallel.data (its states are shared out), optimizer.offload, optimizer.state_dtype = "bfloat16"',
        "activations": 'train.microbatch_tokens, or model.recompute = "full"',
        "logprobs": "model.logprob_chunk, or parallel.tensor",
        "reference": "algorithm.kl_loss_coef = 0 and kl_reward_coef = 0 need no reference policy",
        "critic": 'algorithm.credit = "group" needs no critic',
    }
    largest = max(vars(needed), key=lambda name: vars(needed)[name])
    return f"{largest} are most of it: {fixes[largest]}"
