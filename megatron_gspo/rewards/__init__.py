"""Reward functions: the interface, the built-in ones, and scoring."""

from megatron_gspo.rewards.interface import (
    GroupReward,
    RewardContext,
    RewardFunction,
    RewardResult,
    Score,
    Stopped,
    TokenRewards,
    Ungraded,
)
from megatron_gspo.rewards.registry import BUILTIN_REWARDS, Reward, resolve_reward
from megatron_gspo.rewards.scoring import GroupRewards, score_groups

__all__ = [
    "BUILTIN_REWARDS",
    "GroupReward",
    "GroupRewards",
    "Reward",
    "RewardContext",
    "RewardFunction",
    "RewardResult",
    "Score",
    "Stopped",
    "TokenRewards",
    "Ungraded",
    "resolve_reward",
    "score_groups",
]
