"""What a reward function is given, and what it may return."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_gspo.types import Prompt, Rollout


@dataclass(frozen=True)
class TokenRewards:
    """A reward for each token of a response; gspo-token trains on them, other losses on their mean."""

    values: np.ndarray
    """[R] in [0, 1], aligned with ``Rollout.response_ids``."""

    @classmethod
    def from_turns(cls, rewards: Sequence[float], lengths: Sequence[int]) -> TokenRewards:
        """Each turn's reward for each of its tokens; ``lengths`` are the turns' token counts and sum to R."""
        return cls(np.repeat(np.asarray(rewards, dtype=np.float64), lengths))


class Stopped(float):
    """``Stopped()`` is a reward of 0 for a response whose grading took too long and was stopped; it is counted."""


RewardResult = float | TokenRewards


class RewardFunction(Protocol):
    """``reward(prompt, response)``: a number in [0, 1], or one a token; ``async def`` functions are awaited.

    It reads ``prompt.answer`` and ``prompt.metadata``, and of the response ``text``, ``response_ids`` and
    ``finish_reason``. It must not change them, and it may be called from several threads at a time.
    """

    def __call__(self, prompt: Prompt, response: Rollout) -> RewardResult | Awaitable[RewardResult]: ...
