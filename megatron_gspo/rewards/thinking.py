"""Which part of a response is the answer: what follows the last end of thinking."""

from __future__ import annotations

MAX_RESPONSE = 1_000_000
"""Characters of a response that is looked at; a longer one has no answer."""

_NAMES = [
    form
    for name in ("think", "thinking", "thought", "thoughts", "reasoning", "seed:think", "longcat_think")
    for form in (name, name.capitalize(), name.upper())
]
OPENINGS = (
    *(f"<{name}>" for name in _NAMES),
    *("[THINK]", "◁think▷", "<|begin_of_thought|>", "<|START_THINKING|>", "<|channel|>analysis"),
)
ENDS = (
    *(f"</{name}>" for name in _NAMES),
    *("[/THINK]", "◁/think▷", "<|end_of_thought|>", "<|END_THINKING|>", "<|channel|>final<|message|>"),
)


def after_thinking(prompt: str, response: str) -> str | None:
    """The part of ``response`` after its last end of thinking ("</think>"); all of it when it does not think.

    None when it has no answer: it opens thinking that it does not end, or the prompt ends in an opening ("<think>", as
    some chat templates do) and the response never ends it; or it is longer than ``MAX_RESPONSE``.
    """
    if len(response) > MAX_RESPONSE:
        return None
    end = max((at + len(tag) for tag in ENDS if (at := response.rfind(tag)) >= 0), default=0)
    if any(response.find(tag, end) >= 0 for tag in OPENINGS):
        return None
    if not end and prompt[-100:].rstrip().endswith(OPENINGS):
        return None
    return response[end:]
