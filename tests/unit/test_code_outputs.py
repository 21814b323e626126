"""When an output or a value is what was expected: the rows of docs/code-rewards.md, and values that equal anything."""

from __future__ import annotations

import math
import re

import pytest

from megatron_gspo.rewards.cases import Stdin
from megatron_gspo.rewards.inside.values import Opaque, decode, encode
from megatron_gspo.rewards.outputs import same_output, same_value, stated_tolerance
from tests.unit.test_code_programs import section

ROW = re.compile(r"^\| (?P<layout>[^|`]+) \| `(.*?)` \| `(.*?)` \| ([01]) \|$", re.MULTILINE)


def rows() -> list[tuple[str, str, str, bool]]:
    found = ROW.findall(section("When a test is passed"))
    return [
        (layout, wanted.replace("⏎", "\n"), given.replace("⏎", "\n"), passed == "1")
        for layout, wanted, given, passed in found
    ]


def test_every_row_of_the_page_is_read() -> None:
    assert (
        len(rows())
        == section("When a test is passed").count("\n| apps") + section("When a test is passed").count("\n| live")
        >= 14
    )


@pytest.mark.parametrize(("layout", "expected", "written", "passed"), rows())
def test_an_output_is_right_or_not_as_the_page_says(layout: str, expected: str, written: str, passed: bool) -> None:
    name, _, statement = layout.partition(", ")
    lines = name == "livecodebench"
    tolerance = stated_tolerance(f"an absolute or relative error of {statement}") if statement else None
    assert same_output(Stdin((), lines=lines, numbers=lines), expected, written, tolerance) == passed


@pytest.mark.parametrize(
    ("statement", "tolerance"),
    [
        ("if its absolute or relative error does not exceed $10^{-6}$.", 1e-6),
        ("with a relative or absolute error of at most 10^{−9}", 1e-9),
        ("Answers within 10^-5 of the actual answer", None),
        ("an absolute or relative error at most 1e-4 is allowed", 1e-4),
        ("when its absolute error is at most 0.001", 1e-3),
        ("Each mistake is an absolute disaster. There are up to 10^9 of them.", None),
        ("absolute error. Then the size is at most 10^{-6}", None),
    ],
)
def test_a_tolerance_is_what_the_statement_says(statement: str, tolerance: float | None) -> None:
    assert stated_tolerance(statement) == pytest.approx(tolerance)


@pytest.mark.parametrize("written", ["1e99999999999999999999", "1e-99999999999999999999", "0e99999999999999999999"])
@pytest.mark.parametrize("tolerance", [None, 1e-6])
def test_an_exponent_beyond_all_numbers_is_a_wrong_answer(written: str, tolerance: float | None) -> None:
    assert not same_output(Stdin((), numbers=True), "1", written, tolerance)


def test_values_travel_and_come_back_as_they_were() -> None:
    value = {
        1: (2, [3.5, None, True]),
        "a": {b"\xff": {1, 2}, (1, "x"): frozenset((1 + 2j,))},
        "n": -(10**5000),
        "": "",
    }
    assert decode(encode(value)) == value
    assert type(decode(encode((1, [2])))) is tuple
    assert math.isnan(decode(encode(math.nan)))


def test_what_is_no_plain_value_equals_nothing() -> None:
    class Anything(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    class Object:
        def __eq__(self, other: object) -> bool:
            return True

    assert not same_value(5, decode(encode(Anything(3)))) and same_value(3, decode(encode(Anything(3))))
    found = decode(encode([Object()]))
    assert isinstance(found[0], Opaque) and not same_value([5], found) and found != [5] and found[0] != found[0]
    deep: list[object] = []
    for _ in range(5_000):
        deep = [deep]
    assert "opaque" in str(encode(deep))


@pytest.mark.parametrize(
    ("expected", "found", "tolerance", "same"),
    [
        ([1, [2, 3]], (1, (2, 3)), None, True),
        ([1, 2], [1, 2, 3], None, False),
        ({"a": [1]}, {"a": (1,)}, None, True),
        ({"a": 1}, {"a": 1, "b": 2}, None, False),
        (0.3, 0.1 + 0.2, None, False),
        (0.3, 0.1 + 0.2, 1e-9, True),
        ([0.3], [0.31], 1e-3, False),
        (3, 3.0000001, 1e-6, True),
        (10**400, 1.0, 1e-6, False),
        (1000000007, 1000000008, 1e-6, False),
        ("1", 1, None, False),
        (True, 1, None, True),
        (None, 0, None, False),
        (math.inf, math.inf, 1e-6, True),
        (1.0, math.nan, 1e-6, False),
        ([1, 2], {1, 2}, None, False),
    ],
)
def test_values_are_equal_as_python_has_it_but_for_tuples(expected, found, tolerance, same) -> None:
    assert same_value(expected, found, tolerance) == same
