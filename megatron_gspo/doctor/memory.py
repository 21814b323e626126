"""Check of the memory that a run will take on this machine."""

from __future__ import annotations

from megatron_gspo.doctor.check import Check
from megatron_gspo.doctor.estimate import Estimate, worst_stage
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.gpus import on_gpus
from megatron_gspo.doctor.machine import gib
from megatron_gspo.doctor.reward_server import host_bytes
from megatron_gspo.doctor.served import cache_per_token, engine_item, engine_weights
from megatron_gspo.doctor.sums import RANK_PROCESS, SERVER_PROCESS, against, largest, spell
from megatron_gspo.report.text import count
from megatron_gspo.rollout.sglang.arguments import cpu_cache_tokens

HEAP = 1.4
"""Resident bytes of a rank on a CPU over the estimate: temporaries, buffers of gloo, and freed pieces that stay with
the allocator. Measured with a 194 MiB model on one and two ranks: 1.1 to 1.4, and 1.55 in bfloat16."""


def check_memory(facts: Facts) -> Check | list[Check]:
    """The sum for the fullest rank, and all ranks and servers of this machine against what is free."""
    stage, needed = worst_stage(facts.config, facts.shape, facts.tensors, facts.layout, facts.adapters)
    if facts.machine.gpus:
        return on_gpus(facts, needed, stage)
    copies = needed.weights + needed.optimizer if facts.config.train.checkpoint_async else 0
    rank = int(RANK_PROCESS + HEAP * needed.total) + copies
    servers, ranks = facts.local_servers, facts.ranks_per_node
    server = _server_bytes(facts) if servers else 0
    graders = facts.config.reward_server.count if facts.config.reward_server.model else 0
    grader = host_bytes(facts) if graders else 0
    total, free = ranks * rank + servers * server + graders * grader, facts.machine.free_memory
    text = f"a rank: {spell(needed)}; resident x {HEAP:g} + {gib(RANK_PROCESS)} of process"
    text += f" + {gib(copies)} of copies (train.checkpoint_async)" * bool(copies) + f" = {gib(rank)}"
    text += f"; {'on each node ' if facts.nodes > 1 else ''}{count(ranks, 'rank')} x {gib(rank)}"
    if servers:
        text += f" + {count(servers, 'server')} x {gib(server)}"
    if graders:
        text += f" + {count(graders, 'reward server')} x {gib(grader)}"
    fix = _most(needed, ranks * rank, servers * server)
    return against(f"{text} = {gib(total)} of {gib(free)} free", total, free, fix)


def _server_bytes(facts: Facts) -> int:
    """A local CPU server: process, weights, and the cache of keys and values that ``server_arguments`` asks for."""
    cache = cpu_cache_tokens(facts.config.rollout) * cache_per_token(facts.shape, 1, item=engine_item(facts))
    return SERVER_PROCESS + engine_weights(facts) + cache


def _most(needed: Estimate, ranks: int, servers: int) -> str:
    """What makes the larger part smaller: the servers', the ranks' processes, or what each rank holds."""
    if servers > ranks:
        return "local servers are most of it: fewer rollout.local_servers, or named ones in rollout.servers"
    if HEAP * needed.total < RANK_PROCESS:
        return "ranks' processes are most of it: fewer ranks, by parallel.tensor, pipeline, context or data"
    return largest(needed)
