r"""GSM8K-style final answers: "#### 42", "\boxed{42}", or the last number of the text."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from megatron_gspo.rewards.answers import MAX_ANSWER, final_answer
from megatron_gspo.rewards.expressions import Value
from megatron_gspo.rewards.interface import Stopped
from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.rewards.verifier import StoppedError, shared_verifier
from megatron_gspo.types import Prompt, Rollout

_WELL_FORMED = re.compile(r"#### [-+\u2212]?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)\s*")


def gsm8k(prompt: Prompt, response: Rollout, format_reward: float = 0.0) -> float:
    """1 for a final answer that equals the reference's; else ``format_reward`` when the response at least ends in a
    line "#### number"; else 0. docs/grading.md says what the final answer is and how it is read.

    ``Stopped``, a 0, when the answer took math-verify too long. Raises ValueError when the reference has no final
    number, or ``format_reward`` is not in [0, 1).
    """
    if not 0 <= format_reward < 1:
        raise ValueError(f"format_reward = {format_reward} is not in [0, 1): a wrong answer would pay like a right one")
    expected = reference_value(prompt.answer)
    text = after_thinking(prompt.text, response.text)
    if text is None:
        return 0.0
    try:
        if equal(expected, final_answer(text)):
            return 1.0
    except StoppedError:
        return Stopped()
    return format_reward if is_well_formed(text) else 0.0


@functools.lru_cache(maxsize=4096)
def reference_value(answer: str) -> Fraction:
    """The number in which a reference answer ends. Raises ValueError when it ends in none."""
    found = final_answer(answer)
    if found is None or found.exact is None:
        raise ValueError(f"the reference answer {answer[-80:]!r} ends in no number")
    return found.exact


def equal(expected: Fraction, found: Value | None) -> bool:
    """Whether an answer has exactly the expected value.

    Raises StoppedError when only math-verify could tell and took too long.
    """
    if found is None or found.exact is not None:
        return found is not None and found.exact == expected
    value = Value.of(expected)
    if abs(found.approximate - value.approximate) > 1e-3 * max(1.0, abs(value.approximate)):
        return False  # far off: nothing to ask
    return shared_verifier().equal(value.latex, found.latex)


def is_well_formed(text: str) -> bool:
    """Whether the text ends in GSM8K's own way: a last line "#### number"."""
    line = text.rstrip()[-MAX_ANSWER:].rpartition("\n")[2]
    return _WELL_FORMED.fullmatch(line) is not None
