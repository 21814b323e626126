"""Reward functions: the interface, the built-in ones, and scoring."""

from megatron_gspo.rewards.interface import RewardFunction, Stopped, TokenRewards
from megatron_gspo.rewards.registry import BUILTIN_REWARDS, Reward, resolve_reward
from megatron_gspo.rewards.scoring import GroupRewards, score_groups

__all__ = [
    "BUILTIN_REWARDS",
    "GroupRewards",
    "Reward",
    "RewardFunction",
    "Stopped",
    "TokenRewards",
    "resolve_reward",
    "score_groups",
]
