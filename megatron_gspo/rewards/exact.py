"""The response is the reference answer, character for character."""

from __future__ import annotations

from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.types import Prompt, Rollout


def exact(prompt: Prompt, response: Rollout) -> float:
    """1 when the response, after any thinking, equals the answer, white space around both aside; 0 otherwise.

    A reference that itself thinks ("<think>...") is compared with the whole response.
    """
    answer = prompt.answer.strip()
    if after_thinking("", answer) != answer:
        return float(response.text.strip() == answer)
    text = after_thinking(prompt.text, response.text)
    return float(text is not None and text.strip() == answer)
