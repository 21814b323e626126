"""The quickstart's reward: a user's own function, named in gspo.toml by its file.

A reward is any function of a prompt and a response that returns a number in [0, 1] (or ``TokenRewards``, one number a
token); it may be ``async``. ``docs`` of ``megatron_gspo.rewards`` say what it may read and what happens when it fails.
"""

from __future__ import annotations

import numpy as np

from megatron_gspo.rewards import TokenRewards
from megatron_gspo.types import Prompt, Rollout


def running_sum(prompt: Prompt, response: Rollout) -> float:
    """1 when the response has as many digits as the answer, its last digit is right, and it ends there by itself."""
    complete = response.finish_reason == "stop" and len(response.text) == len(prompt.answer)
    return float(complete and response.text[-1] == prompt.answer[-1])


def running_sum_by_token(prompt: Prompt, response: Rollout) -> TokenRewards:
    """By token: 1 for a digit that is right at its place, and for the end where the answer ends. For ppo.toml."""
    right = [digit == wanted for digit, wanted in zip(response.text, prompt.answer, strict=False)]
    ends = response.finish_reason == "stop" and len(response.text) == len(prompt.answer)
    values = np.zeros(len(response.response_ids))
    values[: len(right)] = right
    values[-1] = float(ends) if response.finish_reason == "stop" else values[-1]
    return TokenRewards(values)
