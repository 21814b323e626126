"""A run's reward, made from its configuration."""

from __future__ import annotations

import functools
import math

from megatron_gspo.config import RewardConfig, RunConfig
from megatron_gspo.data.tokenizer import Tokenizer
from megatron_gspo.errors import ConfigError
from megatron_gspo.hf.catalog import read_config
from megatron_gspo.rewards.interface import RewardContext, RewardServers
from megatron_gspo.rewards.registry import BUILTIN_REWARDS, Reward, named_rewards, resolve_reward
from megatron_gspo.rewards.results import interval
from megatron_gspo.rewards.served import asks_own_servers


def find_source_rewards(
    config: RunConfig, tokenizer: Tokenizer, default: Reward, servers: RewardServers | None = None
) -> dict[str, Reward]:
    """Name of a source -> its reward; sources that name the same one share it. Raises as ``find_reward`` does."""
    made: list[tuple[RewardConfig, Reward]] = [(config.reward, default)]
    found = {}
    for source in config.data.sources:
        wanted = source.reward_config(config.reward)
        reward = next((reward for known, reward in made if known == wanted), None)
        if reward is None:
            try:
                reward = find_reward(config.model_copy(update={"reward": wanted}), tokenizer, servers=servers)
            except ConfigError as error:
                raise ConfigError(f"source {source.name}: {error}") from None
            made.append((wanted, reward))
        found[source.name] = reward
    return found


def find_reward(
    config: RunConfig, tokenizer: Tokenizer, *, trains: bool = True, servers: RewardServers | None = None
) -> Reward:
    """The reward that a configuration names; ``servers``: those of ``[reward_server]``, where they are started. Raises
    ConfigError; where it ``trains`` a policy, also for what other settings would make of its numbers."""
    context = RewardContext.of(config, functools.partial(tokenizer.decode, skip_special=False), servers)
    reward = resolve_reward(config.reward, context)
    if trains and config.rollout.on_truncated == "zero" and math.isnan(reward.worst):
        raise ConfigError(
            f'rollout.on_truncated = "zero" gives a truncated response 0, and {reward.name!r} gives numbers in '
            f"{interval(reward)}, where 0 is not the worst: take keep, drop or mask"
        )
    return reward


def check_reward_server(config: RunConfig) -> None:
    """Raises ConfigError for a ``reward_server.model`` that is no directory of its kind, or that nothing asks."""
    settings = config.reward_server
    if not settings.model:
        return
    try:
        architectures = read_config(settings.model).get("architectures")
    except ConfigError as error:
        raise ConfigError(f"reward_server.model: {error}") from None
    names = [name for name in architectures if isinstance(name, str)] if isinstance(architectures, list) else []
    for kind, ending in (("judge", "ForCausalLM"), ("reward_model", "ForSequenceClassification")):
        if settings.kind != kind and any(name.endswith(ending) for name in names):
            raise ConfigError(
                f'reward_server.model = {settings.model} is a {names[0]}, and reward_server.kind = "{settings.kind}": '
                f'name another directory, or kind = "{kind}"'
            )
    given = [config.reward, *(source.reward_config(config.reward) for source in config.data.sources)]
    if not any(map(may_ask_own_servers, given)):
        asked = ", ".join(part.function for reward in given for part in named_rewards(reward))
        raise ConfigError(
            f"reward_server.model = {settings.model}, and no reward asks it: {asked}; remove it, or leave url out of "
            f"the reward's options"
        )


def may_ask_own_servers(reward: RewardConfig) -> bool:
    """Whether a reward, or a part of it, asks the servers of ``[reward_server]``; one of the user's may."""
    return any(part.function not in BUILTIN_REWARDS or asks_own_servers(part) for part in named_rewards(reward))
