"""The response is a number, and the right one."""

from __future__ import annotations

from megatron_gspo.rewards.numbers import parse_number
from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.types import Prompt, Rollout


def arithmetic(prompt: Prompt, response: Rollout) -> float:
    """1 when the response, after any thinking, is one number equal to the answer ("1,080", "1080." and "$1080.0" are
    all 1080). An expression is no number: "20+22" does not answer "20+22=".

    Raises ValueError when the reference answer is no number: no response could be right.
    """
    expected = parse_number(prompt.answer)
    if expected is None:
        raise ValueError(f"the reference answer {prompt.answer[:80]!r} is not a number")
    text = after_thinking(prompt.text, response.text)
    return float(text is not None and parse_number(text) == expected)
