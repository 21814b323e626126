"""The response is a number, and the right one."""

from __future__ import annotations

from megatron_gspo.rewards.numbers import parse_number
from megatron_gspo.types import Prompt, Rollout


def arithmetic(prompt: Prompt, response: Rollout) -> float:
    """1 when the whole response is one number equal to the answer ("1,080", "1080." and "$1080.0" are all 1080).

    Raises ValueError when the reference answer is no number: no response could be right.
    """
    expected = parse_number(prompt.answer)
    if expected is None:
        raise ValueError(f"the reference answer {prompt.answer!r} is not a number")
    return float(parse_number(response.text) == expected)
