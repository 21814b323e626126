"""Check of the servers that a run starts for its reward model or judge: their directory, their cards, their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_gspo.config import Placement, RunConfig
from megatron_gspo.doctor.check import Check, error, ok
from megatron_gspo.doctor.facts import Facts
from megatron_gspo.doctor.machine import gib
from megatron_gspo.doctor.sums import SERVER_PROCESS
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.report.text import count
from megatron_gspo.rewards.reward_model import ChatTemplate
from megatron_gspo.rollout.sglang.arguments import cpu_cache_tokens
from megatron_gspo.rollout.sglang.cards import ITEM_BYTES, check_divides, check_fits, weight_bytes
from megatron_gspo.rollout.sglang.purpose import PURPOSES
from megatron_gspo.runs.reward_serving import dtype_of, placed
from megatron_gspo.train.reward import check_reward_server as check_settings


def check_reward_server(facts: Facts) -> Check:
    """What can be said of them without starting one. Raises ConfigError."""
    settings, gpus = facts.config.reward_server, facts.machine.gpus
    if not settings.model:
        return ok("reward_server.model is empty: none is started")
    check_settings(facts.config)
    if facts.nodes > 1:
        return error(
            f"{count(facts.nodes, 'node')}, and a server that the first one starts is not reached by the others",
            "start it where all reach it, and name it in reward.options.url; an empty reward_server.model",
        )
    if settings.kind == "reward_model":
        ChatTemplate(settings.model)
    where, purpose = placed(facts.config, ranks=facts.ranks_per_node, cards=len(gpus)), PURPOSES[settings.kind]
    check_divides(where.sizes, read_config(settings.model), purpose)
    weights = weight_bytes(Path(settings.model), dtype_of(facts.config, facts.machine.device))
    text = f"{count(settings.count, 'server')} of {settings.model} ({settings.kind})"
    text += f", weights {gib(weights)} each" if weights is not None else ", weights of unknown size"
    if gpus:
        check_fits(where, weights, min(total for _, total in gpus), purpose)
        text += f", on {'card' if len(where.cards) == 1 else 'cards'} {', '.join(map(str, sorted(where.cards)))}"
        text += f", {where.share:.0%} of each"
    return ok(f"{text}; started with the run, and not asked now")


def fits(config: RunConfig, where: Placement, card: int) -> None:
    """Raises ConfigError where the cards of ``[reward_server]``, of so many bytes each, do not hold its weights."""
    settings = config.reward_server
    check_fits(where, weight_bytes(Path(settings.model), dtype_of(config, "cuda")), card, PURPOSES[settings.kind])


def host_bytes(facts: Facts) -> int:
    """Of one of them in host memory: its process, and on a CPU weights and the cache of keys and values, as far as its
    directory says how large they are."""
    settings = facts.config.reward_server
    if facts.machine.gpus:
        return SERVER_PROCESS
    dtype = dtype_of(facts.config, "cpu")
    try:
        token = _cache_per_token(read_config(settings.model)) * ITEM_BYTES[dtype]
    except (ConfigError, KeyError, TypeError, ZeroDivisionError):  # their own check, or the server, says so
        token = 0
    weights = weight_bytes(Path(settings.model), dtype) or 0
    return SERVER_PROCESS + weights + cpu_cache_tokens(facts.config.rollout) * token


def _cache_per_token(config: dict[str, Any]) -> int:
    """Numbers of a token's keys and values, by the names that most ``config.json`` have."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    return int(2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim)
