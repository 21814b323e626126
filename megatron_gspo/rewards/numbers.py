"""Numbers as people write them: 1,080 and $18.00 and 25% and "42."."""

from __future__ import annotations

import re
from decimal import Decimal

_SIGN = r"(?:(?<![\d)])[-+\u2212])?\$?"
NUMBER = rf"{_SIGN}(?:\d{{1,3}}(?:,\d{{3}})+(?![,\d])|\d+)(?:\.\d+)?|{_SIGN}(?<!\d)\.\d+"
"""One number, for use inside a pattern: sign (not the minus of "5-3"), dollar sign, thousands commas, decimals."""

MAX_LENGTH = 400
"""Longer texts are no answers, and exact arithmetic on that many digits costs more than linear time."""

_NUMBER = re.compile(rf"({NUMBER})\s?%?\.?")
_PLAIN = str.maketrans({"\u2212": "-", "$": None, ",": None})


def parse_number(text: str) -> Decimal | None:
    """The number that ``text`` is, exactly; None when it is anything else.

    Around the digits it may have spaces, a sign, a dollar sign, commas between thousands, a percent sign (which does
    not divide by 100: an answer of 25 is also right as 25%) and a trailing dot.
    """
    text = text.strip()
    match = _NUMBER.fullmatch(text) if len(text) <= MAX_LENGTH else None
    return Decimal(match.group(1).translate(_PLAIN)) if match else None
