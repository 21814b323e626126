"""A prompt, its responses, and a reward that does all that a reward may."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_gspo.rewards import GroupRewards, Reward, Score, Ungraded, score_groups
from megatron_gspo.types import Prompt, Rollout

PROMPT = Prompt("a", "?", (1,), "42")


def group(*texts: str, prompt: Prompt = PROMPT) -> list[Rollout]:
    return [
        Rollout(prompt, i, np.ones(len(text), np.int32), np.zeros(len(text), np.float32), "stop", (0,), text)
        for i, text in enumerate(texts)
    ]


def score(function: Any, *groups: Sequence[Rollout], **settings: Any) -> list[GroupRewards]:
    return asyncio.run(score_groups(Reward("mine", function, **settings), groups))


def by_length(prompt: Prompt, response: Rollout) -> Any:
    if response.text == "bad":
        return Ungraded("the grader is away")
    return Score(len(response.text) / 10, {"long": len(response.text), "odd": len(response.text) % 2})
