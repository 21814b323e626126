"""A run's reward, made from its configuration."""

from __future__ import annotations

import functools
import math

from megatron_gspo.config import RewardConfig, RunConfig
from megatron_gspo.data.tokenizer import Tokenizer
from megatron_gspo.errors import ConfigError
from megatron_gspo.rewards.interface import RewardContext
from megatron_gspo.rewards.registry import Reward, resolve_reward
from megatron_gspo.rewards.results import interval


def find_source_rewards(config: RunConfig, tokenizer: Tokenizer, default: Reward) -> dict[str, Reward]:
    """Name of a source -> its reward; sources that name the same one share it. Raises as ``find_reward`` does."""
    made: list[tuple[RewardConfig, Reward]] = [(config.reward, default)]
    found = {}
    for source in config.data.sources:
        wanted = source.reward_config(config.reward)
        reward = next((reward for known, reward in made if known == wanted), None)
        if reward is None:
            try:
                reward = find_reward(config.model_copy(update={"reward": wanted}), tokenizer)
            except ConfigError as error:
                raise ConfigError(f"source {source.name}: {error}") from None
            made.append((wanted, reward))
        found[source.name] = reward
    return found


def find_reward(config: RunConfig, tokenizer: Tokenizer, *, trains: bool = True) -> Reward:
    """The reward that a configuration names. Raises ConfigError; where it ``trains`` a policy, also for what other
    settings would make of its numbers."""
    context = RewardContext.of(config, functools.partial(tokenizer.decode, skip_special=False))
    reward = resolve_reward(config.reward, context)
    if trains and config.rollout.on_truncated == "zero" and math.isnan(reward.worst):
        raise ConfigError(
            f'rollout.on_truncated = "zero" gives a truncated response 0, and {reward.name!r} gives numbers in '
            f"{interval(reward)}, where 0 is not the worst: take keep, drop or mask"
        )
    return reward
