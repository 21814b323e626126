"""The quickstart's reward: a user's own function, named in gspo.toml by its file.

A reward is any function of a prompt and a response that returns a number in [0, 1] (or ``TokenRewards``, one number a
token); it may be ``async``. ``docs`` of ``megatron_gspo.rewards`` say what it may read and what happens when it fails.
"""

from __future__ import annotations

from megatron_gspo.types import Prompt, Rollout


def running_sum(prompt: Prompt, response: Rollout) -> float:
    """1 when the response has as many digits as the answer, its last digit is right, and it ends there by itself."""
    complete = response.finish_reason == "stop" and len(response.text) == len(prompt.answer)
    return float(complete and response.text[-1] == prompt.answer[-1])
