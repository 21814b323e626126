"""What the readers of tests share: fields of a row, JSON in texts, limits in words."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from megatron_gspo.rewards.cases.tests import MIB, Row

SHORT = 4_000
"""Digits up to which Python's own reader of integers is used."""
MOST_DIGITS = 1_000_000
MOST_AMOUNT = 1e9
"""Of a limit, in its own unit."""


def parsed(value: Any, name: str) -> Any:
    """A field that holds JSON, as a text or already taken apart. Raises ValueError."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_int=integer)
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from None


def integer(digits: str) -> int:
    """An integer of any number of digits: Python's own reader stops at 4,300, and tests have longer ones."""
    if len(digits) <= SHORT:
        return int(digits)
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(Decimal(digits))


def is_texts(value: Any) -> bool:
    """Whether a value is a sequence (Parquet's arrays too) and no text."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def as_list(value: Any, name: str) -> list[Any]:
    """A list. Raises ValueError."""
    if not is_texts(value):
        raise ValueError(f"{name} is no list, but {value!r:.60}")
    return list(value)


def as_text(value: Any, name: str) -> str:
    """A text; numbers are written out, and a list is its lines. Raises ValueError."""
    if isinstance(value, str):
        return unicode(value, name)
    if is_texts(value):
        return "\n".join(as_text(item, name) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{name} is no text, but {value!r:.60}")


def code(row: Row, name: str) -> str:
    """A field that holds code; empty when it is absent. Raises ValueError."""
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name} is no code, but {value!r:.60}")
    return unicode(value, name)


def unicode(text: str, name: str) -> str:
    """A text that can be written to a file or a pipe. Raises ValueError for one with half a surrogate pair, as JSON's
    escapes can make it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is no Unicode text: {error.reason} at character {error.start}") from None
    return text


def amount(value: Any, name: str, words: dict[str, float]) -> float | None:
    """A positive number, bare or as "2.0 seconds"; None when it is absent. Raises ValueError.

    ``words``: the beginning of a unit -> what it multiplies with.
    """
    if value is None or value == "":
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\.?\s*", str(value))
    unit = found[2].lower() if found else ""
    scale = next((scale for word, scale in words.items() if unit.startswith(word)), None)
    if found is None or (unit and scale is None) or not 0 < float(found[1]) <= MOST_AMOUNT:
        raise ValueError(f"{name} = {value!r:.40} is no amount of {' or '.join(words)}")
    return float(found[1]) * (scale if unit and scale is not None else 1.0)


def seconds(row: Row, name: str = "time_limit") -> float | None:
    """A limit of processor time, in seconds. Raises ValueError."""
    return amount(row.get(name), name, {"s": 1.0, "ms": 1e-3, "milli": 1e-3})


def memory(row: Row, name: str = "memory_limit") -> int | None:
    """A limit of memory, in bytes; bare numbers are megabytes. Raises ValueError."""
    found = amount(row.get(name), name, {"m": 1.0, "g": 1024.0, "k": 1 / 1024})
    return None if found is None else int(found * MIB)
