"""Which part of a response is the answer: what follows the last end of thinking."""

from __future__ import annotations

import re

MAX_RESPONSE = 1_000_000
"""Characters of a response that is looked at; a longer one has no answer."""

_NAMES = "think|thinking|thought|thoughts|reasoning|seed:think|longcat_think"
_OPENING = re.compile(
    rf"<(?:{_NAMES})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel\|>analysis", re.IGNORECASE
)
_END = re.compile(
    rf"</(?:{_NAMES})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)


def after_thinking(prompt: str, response: str) -> str | None:
    """The part of ``response`` after its last end of thinking ("</think>"); all of it when it does not think.

    None when it has no answer: it opens thinking that it does not end, or the prompt ends in an opening ("<think>", as
    some chat templates do) and the response never ends it; or it is longer than ``MAX_RESPONSE``.
    """
    if len(response) > MAX_RESPONSE:
        return None
    end = 0
    for match in _END.finditer(response):
        end = match.end()
    if _OPENING.search(response, end):
        return None
    if not end and _opens_thinking(prompt):
        return None
    return response[end:]


def _opens_thinking(prompt: str) -> bool:
    tail = prompt[-100:].rstrip()
    return any(match.end() == len(tail) for match in _OPENING.finditer(tail))
