"""What the mathematical suites share: the prompt, and the answer that votes."""

from __future__ import annotations

import re

from megatron_gspo.rewards.answers import boxed_text, final_answer
from megatron_gspo.rewards.thinking import after_thinking
from megatron_gspo.suites.base import STEP_BY_STEP

R1 = "DeepSeek-R1 (arXiv 2501.12948): temperature 0.6, top-p 0.95, at most 32,768 tokens"
_SPACES = re.compile(r"\\[,;:! ]|\\(?:left|right|displaystyle)(?![a-zA-Z])|\s+")


def ask(problem: str) -> str:
    """The problem with the instruction behind it."""
    return f"{problem.strip()}\n{STEP_BY_STEP}"


def final_form(prompt: str, response: str) -> str | None:
    """The final answer, equal for equal numbers; of what is no number the box's text without spaces and sizes."""
    said = after_thinking(prompt, response)
    if said is None:
        return None
    value = final_answer(said)
    if value is not None:
        return str(value.exact) if value.exact is not None else value.latex
    boxed = boxed_text(said)
    return None if not boxed else re.sub(r"\\[dt]frac", r"\\frac", _SPACES.sub("", boxed)) or None
