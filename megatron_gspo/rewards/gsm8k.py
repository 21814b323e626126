r"""GSM8K-style final answers: "#### 42", "\boxed{42}", or the last number of the text."""

from __future__ import annotations

import logging
import re
from typing import Any

from megatron_gspo.rewards.numbers import NUMBER, parse_number
from megatron_gspo.types import Prompt, Rollout

MAX_LENGTH = 100
"""Characters of a final answer that is looked at. So short, and without powers and factorials, an expression takes
math-verify milliseconds; it must, because math-verify's own timeouts use signals, which threads cannot have."""

_NUMBERS = re.compile(NUMBER)
_MARKED = re.compile(r"####(.*)")
_WELL_FORMED = re.compile(rf"(?:\A|\n)#### (?:{NUMBER})\s*\Z")
_DECORATION = re.compile(r"\A[A-Za-z]\s?=|\\text\{[^{}]*\}|\\?\$|\\(?=%)|(?<=[\d\s%}])[A-Za-z][A-Za-z .]*\Z")
"""A name in front ("x ="), units behind, dollar signs, and TeX's escapes of $ and %."""
_RATIONAL = re.compile(r"(?:[\d+\-\u2212/().,{}\s]|\*(?!\*)|\\(?:[dt]?frac|times|cdot|div|left|right))+")


def gsm8k(prompt: Prompt, response: Rollout, format_reward: float = 0.0) -> float:
    """1 for a final answer that equals the reference's; else ``format_reward`` when the response at least ends in a
    line "#### number"; else 0.

    Raises ValueError when the reference has no final number, or ``format_reward`` is not in [0, 1).
    """
    if not 0 <= format_reward < 1:
        raise ValueError(f"format_reward = {format_reward} is not in [0, 1): a wrong answer would pay like a right one")
    expected = final_answer(prompt.answer)
    if expected is None or parse_number(expected) is None:
        raise ValueError(f"the reference answer {prompt.answer[-80:]!r} ends in no number")
    found = final_answer(response.text)
    if found is not None and equal(expected, found):
        return 1.0
    return format_reward if is_well_formed(response.text) else 0.0


def is_well_formed(text: str) -> bool:
    """Whether the text ends in GSM8K's own way: a last line "#### number"."""
    return _WELL_FORMED.search(text) is not None


def final_answer(text: str) -> str | None:
    r"""What follows the last "####" on its line, else what the last "\boxed{}" holds, else the last number."""
    if marked := _MARKED.findall(text):
        return str(marked[-1]).strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    numbers = _NUMBERS.findall(text)
    return str(numbers[-1]) if numbers else None


def equal(expected: str, found: str) -> bool:
    r"""Whether ``found`` has the value of the number ``expected``.

    Plain numbers compare exactly and fast ("$1,080.00", "25%", "42 apples"); expressions of rational numbers go
    through math-verify ("\frac{84}{2}", "6 \times 7"); anything else is wrong.
    """
    if len(found) > MAX_LENGTH:
        return False
    found = _DECORATION.sub("", found).strip()
    number = parse_number(found)
    if number is not None:
        return number == parse_number(expected)
    found = found.replace("%", "")
    return _RATIONAL.fullmatch(found) is not None and _verify(expected, found)


def _verify(expected: str, found: str) -> bool:
    """math-verify's judgement, without its signal timeouts."""
    import math_verify

    for module in ("parser", "grader"):  # they warn that timeouts are off, which MAX_LENGTH answers
        logging.getLogger(f"math_verify.{module}").setLevel(logging.ERROR)
    gold: list[Any] = math_verify.parse(expected, parsing_timeout=None)
    target: list[Any] = math_verify.parse(f"${found}$", parsing_timeout=None)
    return bool(math_verify.verify(gold, target, timeout_seconds=None))


def _last_boxed(text: str) -> str | None:
    r"""The content of the last "\boxed{...}", braces inside it balanced; None when it never closes."""
    _, marker, rest = text.rpartition(r"\boxed{")
    depth = 1 if marker else 0
    for i, character in enumerate(rest if marker else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i]
    return None
