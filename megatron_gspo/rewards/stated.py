r"""Where a text states its answer: in its last box, behind "####", or behind "the answer is".

Boxes go first: who solves a problem of a competition is asked for one, and "####" heads sections.
"""

from __future__ import annotations

import re

from megatron_gspo.rewards.answers import Span, box_before, marked_span
from megatron_gspo.rewards.reading import is_joining

MAX_STATED = 1000
"""Characters of an answer."""
MAX_BOXES = 20
"""Boxes in a row that are one answer."""
MAX_BETWEEN = 60

_COMMANDS = (r"\boxed", r"\fbox", r"\framebox")
_PHRASE = re.compile(
    r"(?:final\s+answer|answer|result|solution)\s*(?:\*\*|__)?\s*(?:is|are|=|:)\s*(?:\*\*|__)?\s*:?\s*", re.IGNORECASE
)
_CLOSING = re.compile(r"\s*I hope (?:it|this) is correct\.?\s*\Z", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"[.!?](?=\s+[A-Z(\\*]|\s*\Z)|\n|,?\s(?:since|because|as|which|where|so|for|when|if)\s", re.IGNORECASE
)
_TAGGED = re.compile(rf"<answer>(.{{0,{MAX_STATED}}}?)</answer>", re.DOTALL | re.IGNORECASE)
_PHRASES_WITHIN = 4000
"""Characters from the end in which a phrase is looked for."""


def stated_answer(text: str) -> str | None:
    r"""What the text says that its answer is; None where it says so nowhere. Linear in the text's length.

    Boxes with nothing but a comma, "and" or "or" between them are one list.
    """
    if boxes := ", ".join(_last_boxes(text)):
        return boxes if len(boxes) <= MAX_STATED else None
    tagged = _TAGGED.findall(text[-_PHRASES_WITHIN:])
    if tagged and tagged[-1].strip():
        return str(tagged[-1]).strip()
    marked = marked_span(text)
    if marked is not None and marked.text:
        return _undecorated(marked.text)
    return _behind_phrase(text)


def is_cut_off(text: str) -> bool:
    """Whether it has a box, and none that closes: what is in it may go on."""
    return any(command + "{" in text for command in _COMMANDS) and _box(text, len(text)) is None


def _last_boxes(text: str) -> list[str]:
    last = _box(text, len(text))
    if last is None:
        return []
    boxes = [last.text.strip()]
    opened = _opening(text, last.start)
    for _ in range(MAX_BOXES):
        before = _box(text, opened)
        if before is None or not before.end <= opened <= before.end + MAX_BETWEEN:
            break
        if not is_joining(re.sub(r"\\(?:text|quad|,|\(|\)|\[|\])|[{}$]", " ", text[before.end : opened])):
            break
        boxes.insert(0, before.text.strip())
        opened = _opening(text, before.start)
    return list(dict.fromkeys(box for box in boxes if box))


def _box(text: str, end: int) -> Span | None:
    return box_before(text, end, MAX_STATED)


def _opening(text: str, start: int) -> int:
    return max(text.rfind(command, 0, start) for command in _COMMANDS)


def _behind_phrase(text: str) -> str | None:
    """What follows the last "the answer is" of the text's end, to the end of its sentence."""
    end = _CLOSING.sub("", text[-_PHRASES_WITHIN:])
    phrases = list(_PHRASE.finditer(end))
    if not phrases:
        return None
    rest = end[phrases[-1].end() :][:MAX_STATED].lstrip()
    for opening, closing in (("$$", "$$"), (r"\[", r"\]"), ("$", "$"), (r"\(", r"\)")):
        if rest.startswith(opening):
            close = rest.find(closing, len(opening))
            if close > 0 and not re.match(r"[\w\s]{0,20}(?:or|and|,)\s*[$\\\d]", rest[close + len(closing) :]):
                return rest[len(opening) : close].strip() or None
    sentence = _SENTENCE_END.split(rest, maxsplit=1)[0]
    return _undecorated(sentence) or None


def _undecorated(text: str) -> str:
    """Without Markdown's emphasis and quotes."""
    return re.sub(r"\*\*|__|`", "", text).strip(" \t\"'*")
