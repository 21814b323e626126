"""Memory of a machine with GPUs: a rank's peak on its card, the servers' share of theirs, and the host's.

Counted, and not measured on a GPU yet. What a card also holds, CUDA's context and NCCL's buffers, is not in here.
"""

from __future__ import annotations

from megatron_gspo.config import RunConfig
from megatron_gspo.doctor.check import Check, error, ok, warning
from megatron_gspo.doctor.estimate import Estimate, longest_sequence
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.machine import gib
from megatron_gspo.doctor.passing import Passing, peak
from megatron_gspo.doctor.served import cache_per_token, engine_item, engine_weights
from megatron_gspo.doctor.sums import RANK_PROCESS, SERVER_PROCESS, against, largest, spell
from megatron_gspo.report.text import count
from megatron_gspo.sync.base import CARD_BUCKET_MB

FEW = 16
"""Of the longest sequences at once in a server's cache, below which most requests wait for each other."""


def on_gpus(facts: Facts, needed: Estimate, stage: int) -> list[Check]:
    """A line for the ranks' cards (colocated, two: each turn has a peak), one for the servers', one for the host."""
    servers = [_of_servers(facts)] if facts.local_servers else []
    turn = [_of_turn(facts, needed)] if _takes_turns(facts) else []
    return [_of_ranks(facts, needed, stage), *turn, *servers, _of_host(facts, needed)]


def _of_ranks(facts: Facts, needed: Estimate, stage: int) -> Check:
    """The fullest rank while it trains, against the fullest of the cards that ranks of this machine use."""
    config = facts.config
    there = needed.on_card(config)
    away = needed.total - there.total
    passing = Passing.of(config, facts.shape, stage, facts.layout)
    fullest, free = peak(there, passing), _free(facts)
    text = f"a rank: {spell(needed)}"
    text += f"; of it, {gib(away)} in host memory ({_offloaded(config)})" * (away > 0)
    text += f"; {gib(fullest)} at its fullest, with {gib(passing.most)} that come and go"
    asleep = ", where a server sleeps" if _takes_turns(facts) else ""
    text += f", without context and NCCL buffers, of {gib(free)} free on the fullest GPU{asleep}"
    return against(text, fullest, free, largest(there))


def _of_turn(facts: Facts, needed: Estimate) -> Check:
    """A card that a rank shares while its server is awake: the server's share, what the rank keeps there, and what it
    sends."""
    config, placement = facts.config, facts.placement
    card = min(total for _, total in facts.machine.gpus)
    terms = {
        "weights": needed.weights,
        "reference": needed.reference,
        "the critic's weights": needed.weights if needed.critic else 0,
        "sync.bucket_mb": 2 * (config.sync.bucket_mb or CARD_BUCKET_MB) * 10**6,
        f"a server's {placement.share:.0%}": int(placement.share * card),
    }
    total, free = sum(terms.values()), _free(facts)
    spelled = " + ".join(f"{name} {gib(size)}" for name, size in terms.items() if size)
    text = f"a card while its server is awake: {spelled} = {gib(total)}, without both contexts, NCCL buffers and CUDA "
    text += f"graphs, of {gib(free)} free; gradients and optimizer states are in host memory then"
    return against(text, total, free, "a smaller placement.memory; parallel.tensor, pipeline or expert")


def _of_servers(facts: Facts) -> Check:
    """A server's share of a card: its part of the weights, and how many sequences its cache then holds."""
    config, shape, sizes, share = facts.config, facts.shape, facts.placement.sizes, facts.placement.share
    weights = engine_weights(facts) // (sizes.tensor * sizes.pipeline)
    item, groups = engine_item(facts), sizes.attention_data
    token = cache_per_token(shape, sizes.tensor, item=item, groups=groups, stages=sizes.pipeline)
    card = min(total for _, total in facts.machine.gpus)
    room, longest = int(share * card) - weights, longest_sequence(config)
    text = f"a local server's {share:.0%} of {gib(card)} is {gib(share * card)}: weights {gib(weights)}"
    fix = "a larger placement.memory or placement.tensor, or servers named in rollout.servers"
    if room < token * longest:
        return error(f"{text}, and no room for one sequence of {longest} tokens ({gib(token * longest)})", fix)
    at_once = room // (token * longest) * sizes.attention_data
    text += f" + {gib(room)} for keys and values: {count(at_once, 'sequence')} of {longest} tokens at once"
    return warning(f"{text}; other requests wait", fix) if at_once < FEW else ok(text)


def _of_host(facts: Facts, needed: Estimate) -> Check:
    """What the ranks and servers of this machine keep in host memory, beside their processes' code for CUDA."""
    config, ranks, servers = facts.config, facts.ranks_per_node, facts.local_servers
    terms = {
        f"{count(ranks, 'rank')}": ranks * RANK_PROCESS,
        f"{count(servers, 'server')}": servers * SERVER_PROCESS,
        "reward servers": config.reward_server.count * SERVER_PROCESS if config.reward_server.model else 0,
        **{name: ranks * size for name, size in _in_host_memory(facts, needed).items()},
        "copies (train.checkpoint_async)": ranks * (needed.weights + needed.optimizer)
        if config.train.checkpoint_async
        else 0,
        f"weights in {config.sync.directory}": _weights_in_memory(facts),
    }
    total, free = sum(terms.values()), facts.machine.free_memory
    spelled = " + ".join(f"{name} {gib(size)}" for name, size in terms.items() if size)
    most = max(terms, key=lambda name: terms[name])
    return against(f"host: {spelled} = {gib(total)} of {gib(free)} free", total, free, f"{most} are most of it")


def _weights_in_memory(facts: Facts) -> int:
    """Of a sync through files that lie in memory."""
    config = facts.config
    in_memory = config.sync.directory.startswith("/dev/shm")
    if facts.supervised or config.sync.method != "disk" or not in_memory:
        return 0
    return engine_weights(facts)


def _takes_turns(facts: Facts) -> bool:
    return not facts.supervised and facts.placement.colocated


def _in_host_memory(facts: Facts, needed: Estimate) -> dict[str, int]:
    """Optimizer states of a rank that lie there always, or while servers are awake: name -> bytes."""
    if _takes_turns(facts):
        return {"states (placement: colocated)": needed.optimizer + needed.critic_states}
    away = needed.total - needed.on_card(facts.config).total
    return {f"states ({_offloaded(facts.config)})": away}


def _offloaded(config: RunConfig) -> str:
    """The settings that keep states in host memory."""
    both = {"optimizer.offload": config.optimizer.offload, "critic.offload": config.critic.offload}
    return ", ".join(name for name, is_set in both.items() if is_set)


def _free(facts: Facts) -> int:
    """Bytes on the fullest of the ranks' cards."""
    return min(free for free, _ in facts.machine.gpus[: facts.ranks_per_node])
