"""Whether what a program has written, or a function returned, is what was expected. Runs outside of the sandbox, on
texts and plain values: nothing here calls anything of the program's."""

from __future__ import annotations

import math
import re
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_gspo.rewards.cases.tests import Stdin

NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
LONGEST_NUMBER = 10_000
"""Characters of a token up to which it may be a number that another text stands for too."""
STATED = re.compile(
    r"(?:absolute|relative)\s+(?:or\s+(?:absolute|relative)\s+)?(?:error|difference|precision)[^.;]{0,120}?"
    r"(?:10\s*(?:\^|\*\*)?\s*\{?\s*[-\u2212\u2013]\s*(?P<power>\d{1,2})|1[eE]-(?P<exponent>\d{1,2})"
    r"|(?P<plain>0\.0*1)\b)",
    re.IGNORECASE,
)


def stated_tolerance(statement: str) -> float | None:
    """The error that a problem's statement allows ("absolute or relative error of at most 10^{-6}"); None when it
    allows none."""
    found = STATED.search(statement)
    if found is None:
        return None
    power = found["power"] or found["exponent"]
    return 10.0 ** -int(power) if power else float(found["plain"])


def same_output(tests: Stdin, expected: str, found: str, tolerance: float | None = None) -> bool:
    """Whether two outputs have the same tokens; in the same lines, where the tests ask for that.

    Tokens are what white space separates. With a tolerance, and where ``tests.numbers`` says so, two numbers are
    compared by value. White space at the ends of lines, and empty lines at the end, never count.
    """
    if tests.lines:
        expected_rows, found_rows = expected.strip().split("\n"), found.strip().split("\n")
        return len(expected_rows) == len(found_rows) and all(
            _same_row(tests, *rows, tolerance) for rows in zip(expected_rows, found_rows, strict=True)
        )
    return _same_row(tests, expected, found, tolerance)


def _same_row(tests: Stdin, expected: str, found: str, tolerance: float | None) -> bool:
    wanted, given = expected.split(), found.split()
    if len(wanted) != len(given):
        return False
    exact = 0.0 if tests.numbers else None
    allowed = exact if tolerance is None else tolerance
    return all(
        a == b or (allowed is not None and _same_number(a, b, allowed)) for a, b in zip(wanted, given, strict=True)
    )


def _same_number(expected: str, found: str, tolerance: float) -> bool:
    if max(len(expected), len(found)) > LONGEST_NUMBER or not (NUMBER.fullmatch(expected) and NUMBER.fullmatch(found)):
        return False
    try:
        if Decimal(expected) == Decimal(found):
            return True
    except InvalidOperation:  # an exponent beyond what Decimal has: no expected number is so far from 1
        return False
    return tolerance > 0 and close(float(expected), float(found), tolerance)


def close(expected: float, found: float, tolerance: float) -> bool:
    """Whether the absolute or the relative error is at most the tolerance: |a - b| <= tolerance max(1, |a|)."""
    if not (math.isfinite(expected) and math.isfinite(found)):
        return expected == found
    return abs(expected - found) <= tolerance * max(1.0, abs(expected))


def same_value(expected: Any, found: Any, tolerance: float | None = None) -> bool:
    """Whether two plain values are equal, as Python has it, but that a tuple is as good as a list: JSON has no tuples.

    With a tolerance, a float may be off by that much, absolutely or relatively.
    """
    if isinstance(expected, list | tuple):
        if not isinstance(found, list | tuple) or len(expected) != len(found):
            return False
        return all(same_value(a, b, tolerance) for a, b in zip(expected, found, strict=True))
    if isinstance(expected, dict):
        if not isinstance(found, dict) or expected.keys() != found.keys():
            return False
        return all(same_value(value, found[key], tolerance) for key, value in expected.items())
    if tolerance is not None and _are_numbers(expected, found) and float in (type(expected), type(found)):
        try:
            return close(float(expected), float(found), tolerance)
        except OverflowError:  # an integer that no float is near
            return False
    return bool(expected == found)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
