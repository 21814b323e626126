"""The response is the reference answer, character for character."""

from __future__ import annotations

from megatron_gspo.types import Prompt, Rollout


def exact(prompt: Prompt, response: Rollout) -> float:
    """1 when the response equals the answer, white space around both aside; 0 otherwise."""
    return float(response.text.strip() == prompt.answer.strip())
