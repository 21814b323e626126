"""Undressed text as tokens."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_gspo.rewards.dress import RANGE, THIN, TIMES, undress

LATIN = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u03ff\u0400-\u04ff"
"""Letters that make an identifier with the digits behind them ("CO2"); Chinese has no spaces to tell."""
MAX_DIGITS = 400
"""Digits of one number."""

_EXPONENT = r"(?:[eE][+-]?\d{1,3}(?!\w|\.\d))?"
_NUMBER = (
    rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d{{1,3}}(?:{THIN}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?{_EXPONENT}"
    rf"|\.\d+{_EXPONENT}"
)
_TOKEN = re.compile(
    rf"(?P<currency>\$|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CAD|AUD|CHF|Rs\.?)(?![{LATIN}_])|(?:US|AU|CA|HK|NZ|[AC])(?=\$))"
    rf"|(?P<number>{_NUMBER})"
    rf"|(?P<word>[{LATIN}](?:_?[{LATIN}\d'\u2019])*(?:\s{{0,3}}[\^_](?:\{{[^{{}}]{{0,20}}\}}|[+-]?\w))*|(?:(?![{LATIN}_])[^\W\d])+)"
    r"|(?P<command>\\frac|\\sqrt\[\d{1,2}\]|\\(?:[A-Za-z]+|.)?)"
    r"|(?P<space>\s+)"
    rf"|(?P<symbol>.)",
    re.DOTALL,
)
_MATHEMATICS = {r"\frac", r"\sqrt", r"\pi", r"\log", r"\ln", r"\binom", r"\sin", r"\cos", r"\tan"}
"""Commands that an expression may have."""


@dataclass(frozen=True)
class Token:
    """A piece of a mathematical text."""

    kind: str
    """number, word, command (one that is no mathematics), end (of a line or a sentence), or the symbol itself: one of
    ``+-*/^!(){}``, a command of mathematics, ``=``, ``<``, ``:`` (between numbers), ``,`` and so on."""
    text: str
    spaced: bool
    """White space stands before it."""
    value: Fraction | None = None
    """Of a number."""


def tokenize(text: str) -> list[Token]:
    """The tokens of a piece of text in any dress, without currencies and spaces.

    A dash is "-" where it is a sign or a difference, "range" where it stands between numbers, else "dash".
    """
    text = undress(text)
    tokens: list[Token] = []
    spaced = True
    for match in _TOKEN.finditer(text):
        kind, found = str(match.lastgroup), match[0]
        if kind == "space":
            if "\n" in found:
                tokens.append(Token("end", "\n", True))
            spaced = True
        elif kind == "currency":
            continue
        else:
            tokens.append(_token(text, match, kind, found, spaced))
            spaced = False
    return [token for token in tokens if token.kind != "skipped"]


def _token(text: str, match: re.Match[str], kind: str, found: str, spaced: bool) -> Token:
    if kind == "number":
        plain = found.replace(",", "").replace(THIN, "")
        return (
            Token("number", plain, spaced, Fraction(plain)) if len(plain) <= MAX_DIGITS else Token("long", "", spaced)
        )
    if kind == "word":
        return Token("word", found, spaced)
    if kind == "command":
        name = found.partition("[")[0]
        return Token(name if name in _MATHEMATICS else "command", found, spaced)
    before, after = (
        text[max(0, match.start() - 4) : match.start()].rstrip("$"),
        text[match.end() : match.end() + 4].lstrip("$"),
    )
    return Token(_symbol(found, before, after), found, spaced)


def _symbol(symbol: str, before: str, after: str) -> str:
    """The kind of one character between these texts."""
    left, right = before[-1:], after[:1]
    starts_number = right.isdigit() or (right in (".", "(", "\\", "{") and bool(right))
    if symbol in "-" + RANGE:
        if re.match(rf"[{LATIN}_]", left):
            return "dash"
        if symbol == "-":
            return "-"
        if re.search(r"[\d)}%]\s?\Z", before):
            return "range" if after.strip()[:1].isdigit() else "dash"
        return "-" if starts_number else "dash"
    if symbol == TIMES:
        return "*"
    if symbol == "*":  # a product, or a bullet, or emphasis
        if re.search(rf"[\d)}}%][ {THIN}]?\Z", before) and re.match(rf"[ {THIN}]?[\d({{\\.-]", after):
            return "*"
        touching = re.search(r"\w\Z", before) and re.match(r"\w", after)
        spaced = re.search(r"\w \Z", before) and re.match(r" \w", after)
        return "*" if touching or spaced else "skipped"
    if symbol == ".":
        return "end" if not right or right.isspace() else "."
    if symbol in "?\u3002":
        return "end"
    if symbol == ":":
        return ":" if re.search(r"\d ?\Z", before) and (left.isspace() or right.isdigit()) else "label"
    return {">": "<"}.get(symbol, symbol)
