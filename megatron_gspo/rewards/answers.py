r"""Finds and reads the final answer of a text; docs/grading.md has the rules, with examples.

marked     "#### 42", the last one, read strictly: the line must be one number, with its name and its unit
boxed      "\boxed{42}", the last one that closes, read strictly too
last       the last number of the text, where it stands for itself
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_gspo.rewards.expressions import Value
from megatron_gspo.rewards.reading import NO_NUMBER, is_joining, read_last, read_strictly

MAX_ANSWER = 300
"""Characters of a marked or boxed answer."""
MAX_LINE = 1000
"""Characters of a line that are looked at around its last digit."""
MAX_LINES = 20
"""Lines with digits that are searched for the last number, from the end."""
MAX_BOXES = 50
MAX_BETWEEN = 60
"""Characters between two boxes that are looked at for "or" and the like."""

_DIGIT = re.compile(r"[\d¼-¾⅐-⅞]")
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,9}(?:\{|(?=[\d$]))")
_COMMANDS = (r"\boxed", r"\fbox", r"\framebox")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_ANSWER_LABEL = re.compile(r"[\W_]*(?:the\s)?(?:final\s)?(?:answer|result|solution)[\W_]*", re.IGNORECASE)
_CLOSING_HASHES = re.compile(r"[#\s]*\Z")


@dataclass(frozen=True)
class Span:
    """A stretch of the text that may hold the answer."""

    text: str
    start: int
    end: int


def final_answer(text: str) -> Value | None:
    """The value of the text's final answer; None when it has none that can be read. Linear in the text's length."""
    marked, boxed = marked_span(text), _boxed(text)
    if marked and (value := read_strictly(marked.text, boxed=False)):
        return value
    if boxed and (value := read_strictly(boxed.text, boxed=True)):
        return value
    return _last(text, marked, boxed)


def boxed_text(text: str) -> str:
    """What the last box holds, whatever it is; empty where there is none, or where several are alternatives."""
    boxed = _boxed(text)
    return boxed.text if boxed else ""


def marked_span(text: str) -> Span | None:
    """What follows the last "####": its line or, when that is empty or says "Answer", the next line with text."""
    at = text.rfind("####")
    if at < 0:
        return None
    line_start = text.rfind("\n", 0, at) + 1
    line_end = text.find("\n", at)
    line_end = len(text) if line_end < 0 else line_end
    if not text[at : min(line_end, at + MAX_ANSWER)].strip("# \t\r*_:"):  # closing hashes, as in "#### 42 ####"
        opened = text.find("####", line_start, at)
        if opened >= 0 and text[opened:at].strip("# \t"):
            return _span(text, opened, at)
    start = at + 4
    if line_end - start <= MAX_ANSWER and (
        not text[start:line_end].strip("# \t\r*_:$") or _ANSWER_LABEL.fullmatch(text[start:line_end].strip("#"))
    ):
        start = (
            line_end
            + len(text[line_end : line_end + MAX_ANSWER])
            - len(text[line_end : line_end + MAX_ANSWER].lstrip())
        )
        line_end = text.find("\n", start)
        line_end = len(text) if line_end < 0 else line_end
    return _span(text, start, line_end)


def _span(text: str, start: int, end: int) -> Span | None:
    """None when nothing is there; too long a stretch is kept without text, so that no number in it counts."""
    content = text[start:end].strip("# \t\r\n") if end - start <= MAX_ANSWER else ""
    return Span(content, start, end) if end > start else None


def _boxed(text: str) -> Span | None:
    """What the last box that closes holds; a box without text where two that differ are alternatives or a list."""
    last = box_before(text, len(text))
    if last is None:
        return None
    opened = max(text.rfind(command, 0, last.start) for command in _COMMANDS)
    before = box_before(text, opened)
    if before is None or not before.end <= opened <= before.end + MAX_BETWEEN:
        return last
    is_same = before.text.split() == last.text.split()
    return last if is_same or not is_joining(text[before.end : opened]) else Span("", last.start, last.end)


def box_before(text: str, end: int, longest: int = MAX_ANSWER) -> Span | None:
    """What the last box that closes and that opens before ``end`` holds, within ``longest`` characters."""
    for _ in range(MAX_BOXES):
        start = max(text.rfind(command, 0, end) for command in _COMMANDS)
        if start < 0:
            return None
        opening = _BOX.match(text, start)
        if opening and opening[0].endswith("{"):
            closing = _closing_brace(text, opening.end(), longest)
            if closing is not None:
                return Span(text[opening.end() : closing], opening.end(), closing)
        elif opening:
            content = re.compile(r"[^\s{}]{1,60}").match(text, opening.end())
            assert content is not None
            return Span(content[0], content.start(), content.end())
        end = start
    return None


def _closing_brace(text: str, start: int, longest: int) -> int | None:
    """Where the brace that was opened before ``start`` closes, within ``longest`` characters."""
    depth = 1
    for piece in _BRACES.finditer(text, start, start + longest):  # "\\{" is a brace of the text
        depth += {"{": 1, "}": -1}.get(piece[0], 0)
        if depth == 0:
            return piece.start()
    return None


def _last(text: str, marked: Span | None, boxed: Span | None) -> Value | None:
    """The last number; in a marked or boxed stretch that could not be read, only when it is the one number there."""
    end = len(text)
    backwards = text[::-1]
    for _ in range(MAX_LINES):
        digit = _DIGIT.search(backwards, len(text) - end)
        if digit is None:
            return None
        at = len(text) - digit.end()
        for span, is_box in ((boxed, True), (marked, False)):
            if span is not None and span.start <= at < span.end:
                found = read_last(span.text, boxed=is_box, alone=True)
                return found if isinstance(found, Value) else None
        line_start = text.rfind("\n", 0, at) + 1
        start = max(line_start, at - MAX_LINE)
        line_end = text.find("\n", at, at + MAX_LINE // 4)
        found = read_last(text[start : line_end if line_end >= 0 else at + MAX_LINE // 4], cut=start > line_start)
        if found is not NO_NUMBER:
            return found if isinstance(found, Value) else None
        end = line_start
    return None
