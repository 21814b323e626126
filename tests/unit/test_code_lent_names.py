"""A function that a grader's imports lend is no answer of the program that was asked for one of that name."""

from __future__ import annotations

import types

import pytest

from megatron_gspo.rewards.inside.call import called, lend_again

PREAMBLE = "from operator import add\nfrom heapq import merge"


def result(source: str, name: str = "add", arguments: tuple[object, ...] = (1, 2)) -> dict[str, object]:
    module = types.ModuleType("solution")
    exec(PREAMBLE, module.__dict__)
    lent = lend_again(module, [name])
    exec(source, module.__dict__)
    return called(module, lent, name, list(arguments), {})


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("class Solution:\n    def add(self, a, b):\n        return a - b", {"ok": -1}),
        ("def add(a, b):\n    return a - b", {"ok": -1}),
        ("class Solution:\n    def add(self, a, b):\n        return add(a, b) * 2", {"ok": 6}),
        ("from operator import add", {"ok": 3}),
        ("x = {1}\nx.add(2)", {"raised": "AttributeError"}),
        ("class Solution:\n    pass", {"raised": "AttributeError"}),
    ],
)
def test_the_programs_own_function_is_called_and_no_lent_one(source: str, expected: dict[str, object]) -> None:
    assert result(source) == expected
