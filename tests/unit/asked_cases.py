"""A prompt, its responses, and what a reward that asks a server makes of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from megatron_gspo.rewards import GroupRewards, Reward, score_groups
from megatron_gspo.types import Prompt, Rollout

PROMPT = Prompt("line-1", "<user>6*7?<end>", (1,), "42", {"level": 3}, asked="6*7?")


def group(*texts: str, prompt: Prompt = PROMPT) -> list[Rollout]:
    return [
        Rollout(prompt, i, np.ones(3, np.int32), np.zeros(3, np.float32), "stop", (0,), text)
        for i, text in enumerate(texts)
    ]


def score(reward: Reward, *groups: Sequence[Rollout]) -> list[GroupRewards]:
    return asyncio.run(score_groups(reward, groups))
