"""Prompts, and what came of them: responses, and groups of responses with their rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Prompt:
    """One prompt, rendered and tokenized.

    >>> Prompt(id="line-1", text="7+5=", token_ids=(9, 2, 7, 4), answer="12").visit
    0
    """

    id: str
    """Unique within its file; the seed of a rollout is derived from it."""
    text: str
    """After the chat template, exactly what ``token_ids`` encodes."""
    token_ids: tuple[int, ...]
    """[N], never empty."""
    answer: str
    """Reference answer, handed to the reward; empty when there is none."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Whatever else the prompt's line held."""
    source: str = ""
    """The name of its source, where several are mixed."""
    visit: int = 0
    """How often this outer step has drawn the prompt before: an epoch's end may lie in it. Enters the seed."""
    asked: str | tuple[Mapping[str, Any], ...] = ""
    """What the row holds, before the chat template: a text, or turns with ``role`` and ``content``; for rewards that
    show it to another model. Empty where it is not known."""

    @property
    def turns(self) -> list[dict[str, Any]]:
        """What is asked as chat turns, for another model's template; ``text`` as the user's where nothing is known.

        >>> Prompt("p", "<user>7+5=", (9, 2), "12", asked="7+5=").turns
        [{'role': 'user', 'content': '7+5='}]
        """
        asked = self.asked or self.text
        return [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(turn) for turn in asked]


@dataclass(frozen=True)
class Rollout:
    """One response of the inference engine, validated on arrival.

    >>> prompt = Prompt("line-1", "7+5=", (9, 2, 7, 4), "12")
    >>> rollout = Rollout(
    ...     prompt, sample=0, response_ids=np.array([3, 4, 1], dtype=np.int32),
    ...     rollout_logprobs=np.array([-0.1, -0.2, -0.1], dtype=np.float32), finish_reason="stop", weight_versions=(4,),
    ...     text="12")
    >>> rollout.truncated, len(rollout.response_ids)
    (False, 3)
    """

    prompt: Prompt
    sample: int
    """Position in its group, 0 <= sample < G."""
    response_ids: np.ndarray
    """[R] int32; ends with the stop token when ``finish_reason`` is "stop"."""
    rollout_logprobs: np.ndarray
    """[R] float32; the engine's log mu(token | prefix) after temperature, aligned with ``response_ids``."""
    finish_reason: FinishReason
    """"stop": a stop token was drawn; "length": the limit cut it (truncated); "abort": the server gave up."""
    weight_versions: tuple[int, ...]
    """Distinct weight versions that produced the tokens, in order; more than one means a mixed-version response."""
    text: str = ""
    """``response_ids`` decoded without the stop token at their end, and without special tokens unless
    ``reward.special_tokens``; what rewards read."""
    routes: np.ndarray | None = None
    """[at most N + R - 1, L, K] uint8 (up to 256 experts) or uint16: row i holds the experts that token i, as input,
    was sent to. L counts dense layers too, whose rows mean nothing. None when routes were not asked for, or when they
    are not those of one set of weights (a mixed-version response)."""

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut it."""
        return self.finish_reason == "length"


@dataclass(frozen=True)
class RolloutGroup:
    """The surviving responses of one prompt, with their rewards.

    >>> prompt = Prompt("line-1", "7+5=", (9, 2, 7, 4), "12")
    >>> ids, logprobs = np.array([3, 4], dtype=np.int32), np.zeros(2, dtype=np.float32)
    >>> rollouts = tuple(Rollout(prompt, sample, ids, logprobs, "length", (4,)) for sample in range(2))
    >>> RolloutGroup(prompt, rollouts, rewards_G=np.array([1.0, 0.0])).rewards_G.mean()
    np.float64(0.5)
    """

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    """G_p survivors, at least two."""
    rewards_G: np.ndarray
    """[G_p] float64 in the reward's range: [0, 1] unless it says otherwise."""
    token_rewards_G: tuple[np.ndarray, ...] | None = None
    """Per-token rewards, each [R] float64; None when the reward gave one number per response."""
    components_G: tuple[dict[str, float], ...] = ()
    """Named components of each response's reward; empty when none has one."""
