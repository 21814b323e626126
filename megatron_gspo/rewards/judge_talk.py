"""A conversation with a judge: a question, its answer, and a reminder where that holds nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from megatron_gspo.rewards.asking import NoAnswerError, Service

REMINDERS = 2
"""How often a judge whose answer holds no verdict is reminded of it before the response stays ungraded."""
REMINDER = "That holds no grade in the form that was asked for. Answer again, with the grade alone, in that form."
MOST_REPEATED = 2000
"""Characters of such an answer that the judge is shown again."""
Found = TypeVar("Found")


@dataclass(frozen=True)
class Said(Generic[Found]):
    """A verdict, and what it took."""

    found: Found
    prompt_tokens: int
    completion_tokens: int
    requests: int


def chat(model: str, system: str, asked: str, max_tokens: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """A request at temperature 0, unless ``extra`` says otherwise."""
    first = [{"role": "system", "content": system}] if system else []
    messages = [*first, {"role": "user", "content": asked}]
    return {"model": model, "messages": messages, "temperature": 0.0, "max_tokens": max_tokens, **extra}


async def converse(service: Service, question: dict[str, Any], read: Callable[[str], Found | None]) -> Said[Found]:
    """What ``read`` finds in the judge's answer. Raises NoAnswerError where it finds nothing after ``REMINDERS``, and
    what ``Service.ask`` raises."""
    used, messages, said = [0, 0], list(question["messages"]), ""
    for number in range(1, REMINDERS + 2):
        said, usage = _said(await service.ask({**question, "messages": messages}))
        used = [total + more for total, more in zip(used, usage, strict=True)]
        if (found := read(said)) is not None:
            return Said(found, used[0], used[1], number)
        repeated = {"role": "assistant", "content": said[-MOST_REPEATED:]}
        messages = [*messages, repeated, {"role": "user", "content": REMINDER}]
    raise NoAnswerError(f"{REMINDERS + 1} answers without a grade, the last: {said[-200:]!r}")


def _said(answer: Any) -> tuple[str, tuple[int, int]]:
    """The text of a chat completion, and (prompt, completion) tokens. Raises NoAnswerError."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise NoAnswerError(f"no chat completion: {answer!r:.200}") from None
    usage = answer.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    used = [count if isinstance(count, int) and 0 <= count < 10**9 else 0 for count in counts]
    return text if isinstance(text, str) else "", (used[0], used[1])
