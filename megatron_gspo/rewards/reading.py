"""Reads a value from a line: strictly, where the whole line must be the answer, or its last number."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from megatron_gspo.rewards import words as vocabulary
from megatron_gspo.rewards.expressions import UnreadableError, Value, evaluate
from megatron_gspo.rewards.tokens import Token, tokenize

NO_NUMBER: Final = "no number"

_LOOKS_LIKE_ZEROS = re.compile(r"[Oo\u041e\u043e][Oo\u041e\u043e\d]*")
"""Latin and Cyrillic letters behind a digit: "1O" is perhaps 10, and surely not 1."""
_LIST_MARKER = re.compile(r"\s*(?:>\s{1,3})*(?:(?:\(?\d{1,3}[.)]|[-+*\u2022])\s{1,9}(?=\S))?")


@dataclass(frozen=True)
class Run:
    """A maximal stretch of mathematics that has a number: tokens start to end, the end not included."""

    start: int
    end: int


def read_strictly(text: str, *, boxed: bool) -> Value | None:
    """The value that the whole of ``text`` states: one number or expression, with a name before it ("x =",
    "Answer:") and a unit behind it. ``boxed``: a final "!" is a factorial, else an exclamation mark."""
    tokens = tokenize(text if boxed else _without_list_marker(text))
    if any(token.kind in ("<", "±", "range", "long", "command") for token in tokens):
        return None
    parts = _split(tokens, "=")
    if any(_goes_on(part) for part in parts[:-1]):
        return None  # x = 4, y = 2
    value = _statement(parts[-1], boxed)
    if len(parts) == 1:
        return value
    others = [_statement(part, boxed) for part in parts[:-1]]
    if value is None and not any(token.kind == "number" for token in parts[-1]):
        value = others[-1]  # 42 = x
    if value is None or any(other and other.exact != value.exact for other in others):
        return None  # 41 = 42
    return value


def read_last(text: str, *, boxed: bool = False, alone: bool = False, cut: bool = False) -> Value | str | None:
    """The value of the last number of a line, or of the expression that it is part of.

    ``alone``: it must be the only one. ``cut``: the line begins before ``text``. None when the number does not stand
    for itself ("42 or 43", "x < 42"); NO_NUMBER when the line has none.
    """
    rest = _without_list_marker(text)
    tokens = tokenize(rest if not cut and re.search(r"\d", rest) else text)
    runs = _runs(tokens)
    if not runs:
        return None if any(token.kind == "long" for token in tokens) else NO_NUMBER
    if (alone and len(runs) > 1) or any(token.kind == "long" for token in tokens[runs[-1].start :]):
        return None
    if (cut and runs[-1].start == 0) or _is_joined(tokens, runs):
        return None
    return _value(tokens, runs[-1], boxed=boxed, strict=False)


def is_joining(text: str) -> bool:
    """Whether what stands on both sides of ``text`` are alternatives or a list: " or ", ", ", nothing at all."""
    return all(_joins(token) for token in tokenize(text))


def _without_list_marker(text: str) -> str:
    """The line without "2. ", "(2) " or a quotation's ">"."""
    match = _LIST_MARKER.match(text)
    return text[match.end() :] if match and not re.match(r"\s*[-+*]", match[0]) else text


def _split(tokens: Sequence[Token], kind: str) -> list[list[Token]]:
    parts: list[list[Token]] = [[]]
    for token in tokens:
        if token.kind == kind:
            parts.append([])
        else:
            parts[-1].append(token)
    return [part for part in parts if part] or [[]]


def _goes_on(tokens: Sequence[Token]) -> bool:
    """Whether another statement follows the number: "4, y" of "x = 4, y = 2"."""
    runs = _runs(tokens)
    return bool(runs) and any(
        token.kind in (",", ";") or token.text.lower() in ("and", "or") for token in tokens[runs[-1].end :]
    )


def _statement(tokens: Sequence[Token], boxed: bool) -> Value | None:
    """The value of "name: number unit" or "number unit"."""
    runs = _runs(tokens)
    if len(runs) != 1:
        return None
    run = runs[0]
    before = [token for token in tokens[: run.start] if token.kind in ("word", "label", "end")]
    if before and not _is_name(before):
        return None
    after = tokens[run.end :]
    if any(token.text in vocabulary.JOINING - {"per"} or token.kind in (":", ",", "_") for token in after):
        return None
    return _value(tokens, run, boxed=boxed, strict=True)


def _is_name(tokens: Sequence[Token]) -> bool:
    """Whether these name the number behind them: they end in ":" or "is", and are no heading."""
    ends = tokens[-1].kind == "label" or tokens[-1].text.lower() in vocabulary.IS
    return ends and tokens[0].text.lower() not in vocabulary.HEADINGS


def _runs(tokens: Sequence[Token]) -> list[Run]:
    runs, start = [], None
    for index, token in enumerate([*tokens, Token("end", "", False)]):
        if token.kind in vocabulary.MATHEMATICS:
            start = index if start is None else start
        elif start is not None:
            if any(token.kind in ("number", r"\pi") for token in tokens[start:index]):
                runs.append(Run(start, index))
            start = None
    return runs


def _is_joined(tokens: Sequence[Token], runs: Sequence[Run]) -> bool:
    """Whether the last two numbers are alternatives, a range, a list or a ratio, and not one answer."""
    if len(runs) < 2:
        return False
    between = tokens[runs[-2].end : runs[-1].start]
    if all(map(_joins, between)):
        return True
    words = [token.text.lower() for token in between if token.kind == "word"]
    unit = [token.text.lower() for token in tokens[runs[-1].end :] if token.kind == "word"][: len(words) - 1]
    return words[-1:] == ["or"] and words[:-1] == unit  # "42 apples or 43 apples"


def _joins(token: Token) -> bool:
    return token.text.lower() in vocabulary.JOINING or token.kind in vocabulary.JOINING_SYMBOLS


def _value(tokens: Sequence[Token], run: Run, *, boxed: bool, strict: bool) -> Value | None:
    start, end = _trimmed(tokens, run, boxed, strict)
    if start is None or _is_blocked_before(tokens, start) or _is_blocked_behind(tokens, end):
        return None
    if not boxed and _is_date_or_range(tokens[start:end], strict):
        return None
    try:
        value = evaluate(tokens[start:end])
    except UnreadableError:
        return None
    if _is_between_bars(tokens, start, end):
        return None if value.exact is None else Value.of(abs(value.exact))
    return _scaled(value, tokens[end:])


def _is_date_or_range(tokens: Sequence[Token], strict: bool) -> bool:
    """Whether numbers with a dash between them are no difference: 2024-03-05, 555-1234, and 5-10 in prose."""
    numbers, signs = tokens[::2], tokens[1::2]
    if not signs or len(numbers) == len(signs) or any(token.spaced for token in tokens[1:]):
        return False
    if any(token.kind != "-" for token in signs) or any(token.value is None for token in numbers):
        return False
    if any(re.match(r"0\d", token.text) for token in numbers):
        return True
    return not strict and (len(numbers) > 2 or numbers[0].value < numbers[1].value)  # type: ignore[operator]


def _is_between_bars(tokens: Sequence[Token], start: int, end: int) -> bool:
    """Whether it is an absolute value; a row of a table has spaces, or more bars."""
    if start == 0 or end == len(tokens) or tokens[start].spaced:
        return False
    return tokens[start - 1].kind == tokens[end].kind == "|" and sum(token.kind == "|" for token in tokens) == 2


def _trimmed(tokens: Sequence[Token], run: Run, boxed: bool, strict: bool) -> tuple[int | None, int]:
    """The run without what is punctuation at its ends; None when an operator lacks its operand there."""
    start, end = _balanced(tokens, run)
    while start < end:
        token = tokens[start]
        following = tokens[start + 1] if start + 1 < end else None
        if token.kind in (")", "}", "!"):
            start += 1
        elif token.kind == "-" and not strict and following is not None and following.spaced:
            start += 1  # "Answer - 42"
        elif token.kind == "+" and start == 0 and following is not None and following.spaced:
            start += 1  # a bullet
        elif token.kind in ("*", "/", "^", "_") or (token.kind == "+" and following is not None and following.spaced):
            return None, end
        else:
            break
    while start < end:
        token = tokens[end - 1]
        follows = tokens[end].kind if end < len(tokens) else "end"
        if token.kind in ("(", "{", "-") or (token.kind == "!" and not boxed):
            end -= 1
        elif token.kind == "/" and follows == "word":
            end -= 1  # a unit: 42/day
        elif token.kind in ("*", "/", "^", "_", "+"):
            return None, end
        else:
            break
    return (start if start < end else None), end


def _balanced(tokens: Sequence[Token], run: Run) -> tuple[int, int]:
    """The run's last stretch whose parentheses and braces match: those of prose are cut off."""
    start, end = run.start, run.end
    open_at: list[int] = []
    for index in range(run.start, run.end):
        kind = tokens[index].kind
        if kind in "({":
            open_at.append(index)
        elif kind in ")}":
            if open_at:
                open_at.pop()
            elif any(token.kind in ("number", r"\pi") for token in tokens[index + 1 : run.end]):
                start = index + 1
            else:
                end = index
                break
    for index in open_at:
        if any(token.kind in ("number", r"\pi") for token in tokens[index + 1 : end]):
            start = max(start, index + 1)
        else:
            end = min(end, index)
            break
    return start, end


def _is_blocked_before(tokens: Sequence[Token], start: int) -> bool:
    """Whether what stands before says that the number is not the value: x < 42, not 42, \\overline{42}, f(42)."""
    before = tokens[start - 1] if start else None
    if before is None:
        return False
    if before.kind in ("<", "±", "√", "command", "range", ":", "_", "^") or before.kind in vocabulary.FUNCTIONS:
        return True
    if _is_mark(before) and not tokens[start].spaced:
        return True
    if tokens[start].kind == "(" and not tokens[start].spaced and before.kind == "word":
        return True
    if before.kind in ("(", "{") and not before.spaced and start > 1:
        opener = tokens[start - 2]
        return opener.kind in ("word", "command", "_", "^", "number") or opener.kind in vocabulary.FUNCTIONS
    words = [token.text.lower().replace("\u2019", "'") if token.kind == "word" else "" for token in tokens[:start]]
    while words and words[-1] in vocabulary.EQUALS:
        words.pop()  # "not equal to 42", "cannot be 42"
    negated = bool(words) and (words[-1] in vocabulary.NEGATIONS or words[-1].endswith("n't"))
    return negated or (before.kind == "word" and before.text.lower() in vocabulary.NOT_THE_VALUE)


def _is_mark(token: Token) -> bool:
    """Whether it is a combining character, which makes something else of a digit: 0.3 with a dot is a third."""
    return len(token.text) == 1 and unicodedata.category(token.text).startswith("M")


def _is_blocked_behind(tokens: Sequence[Token], end: int) -> bool:
    """Whether what stands behind makes another value of the number: 42x, 42 squared, 42 and a half, 42 < x."""
    behind = tokens[end : end + 4]
    if not behind:
        return False
    first = behind[0]
    if first.kind in ("<", "±", "_", "‰", ":") or (first.kind == "command" and first.text not in vocabulary.HARMLESS):
        return True
    if not first.spaced and (_is_mark(first) or _LOOKS_LIKE_ZEROS.fullmatch(first.text)):
        return True
    if first.kind == "word" and (
        (first.text in vocabulary.VARIABLES and (not first.spaced or first.text == "pi"))
        or first.text.lower() in vocabulary.CHANGING
    ):
        return True
    words = [token.text.lower() for token in behind]
    return words[0] == "and" and any(word in vocabulary.PARTS for word in words[1:])


def _scaled(value: Value, behind: Sequence[Token]) -> Value | None:
    """The value times what a word behind it says: 5 million, 5k."""
    word = behind[0] if behind and behind[0].kind == "word" else None
    if word is None:
        return value
    scale = 1000 if word.text in ("k", "K") and not word.spaced else vocabulary.SCALES.get(word.text.lower(), 1)
    if scale == 1:
        return value
    try:
        return Value.of(value.exact * Fraction(scale)) if value.exact is not None else None
    except UnreadableError:
        return None
