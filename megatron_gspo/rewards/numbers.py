"""Plain numbers as people write them: 1,080 and $18.00 and 25% and "42."."""

from __future__ import annotations

from fractions import Fraction

from megatron_gspo.rewards.tokens import tokenize

MAX_LENGTH = 400
"""Longer texts are no numbers, and exact arithmetic on that many digits costs more than linear time."""


def parse_number(text: str) -> Fraction | None:
    """The number that ``text`` is, exactly; None when it is anything else, an expression or a fraction among them.

    Around the digits it may have a sign, a currency, separators between thousands, a percent sign (which does not
    divide by 100: an answer of 25 is also right as 25%), a trailing dot, and the dress of docs/grading.md.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return None
    tokens = [token for token in tokenize(text) if token.kind != "label"]
    sign = 1
    if tokens and tokens[0].kind in ("+", "-"):
        sign = -1 if tokens[0].kind == "-" else 1
        tokens = tokens[1:]
    number, rest = (tokens[0].value, tokens[1:]) if tokens else (None, [])
    if number is None or [token.kind for token in rest] not in ([], ["%"], ["end"], ["%", "end"]):
        return None
    return sign * number
