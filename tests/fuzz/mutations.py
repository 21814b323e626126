"""Sound input -> malformed input: mutations of JSON trees, of bytes and of text, as Hypothesis strategies.

Each test of this directory starts from something sound and breaks it, since random bytes are turned away at the first
check. Examples are derandomized (tests/conftest.py): a seeded set that is the same on every machine. `make fuzz` draws
several times as many (``TIMES``) from a seed that it names, and counts them.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
"""How many times its usual number of inputs each test draws; above 1 from pytest's ``--hypothesis-seed``."""
COUNTS: Counter[str] = Counter()
"""Inputs that were tried, by the file that tries them."""
HANG_S = 180 * TIMES
"""Seconds that a test of this directory may take (pytest-timeout); what hangs fails."""

SCALARS = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, 1, -1, 2, 3, 7, 1.0, 0.5, -0.5, -1e-9, 1e-5, 1e39, -1e39, 2**31, 2**63, -(10**400)),
            *(float("nan"), float("inf"), float("-inf"), "", "7", "6", " 7", "stop", "length", "abort", "\ud800", "\0"),
            *("true", "default", "a\nb", "x" * 400),
        ]
    ),
    st.integers(-(10**6), 10**6),
    st.floats(),
    st.text(max_size=12),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "delete", "copy", "rename", "wrap", "repeat"]),
        st.integers(0, 10_000),
        st.integers(0, 10_000),
        VALUES,
    ),
    min_size=1,
    max_size=3,
)
"""(operation, place, other place, value): what ``mutated`` does, one after the other."""
BYTE_MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "cut", "drop", "insert", "double"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 7),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=3,
)
"""(operation, place in [0, 1), bit, bytes): what ``mutated_bytes`` does."""


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Decorates a test that ``given`` has decorated, with so many examples, which are counted."""
    chosen = settings(
        max_examples=examples * TIMES,
        deadline=None,
        derandomize=TIMES == 1,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    def decorate(test: Any) -> Any:
        inner, kind = test.hypothesis.inner_test, test.__module__.rpartition("test_")[2].replace("_", " ")

        @functools.wraps(inner)
        def counted(*arguments: Any, **named: Any) -> Any:
            COUNTS[kind] += 1
            return inner(*arguments, **named)

        test.hypothesis.inner_test = counted
        return chosen(test)

    return decorate


def mutated(tree: Any, mutations: list[tuple[str, int, int, Any]]) -> Any:
    """A copy of a JSON tree with the mutations applied; the root itself may be replaced."""
    box = [copy.deepcopy(tree)]
    for operation, place, other, value in mutations:
        places = list(_places(box))
        node, key = places[place % len(places)]
        source, source_key = places[other % len(places)]
        if operation == "set":
            node[key] = copy.deepcopy(value)
        elif operation == "copy":
            node[key] = copy.deepcopy(source[source_key])
        elif operation == "wrap":
            node[key] = [node[key]]
        elif isinstance(node, dict):
            moved = node.pop(key)
            if operation == "rename":
                node[f"{key}_"] = moved
            elif operation == "repeat":
                node[key] = [moved, moved]
        elif node is not box:
            moved = node.pop(key)
            if operation == "repeat":
                node[key:key] = [moved, moved]
    return box[0]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in a tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in list(items):
        yield node, key
        yield from _places(value)


def mutated_bytes(content: bytes, mutations: list[tuple[str, float, int, bytes]]) -> bytes:
    data = bytearray(content)
    for operation, place, bit, extra in mutations:
        at = int(place * len(data))
        if operation == "flip" and data:
            data[at] ^= 1 << bit
        elif operation == "cut":
            del data[at:]
        elif operation == "drop":
            del data[at : at + len(extra)]
        elif operation == "insert":
            data[at:at] = extra
        else:
            data[at:at] = data[at : at + 40]
    return bytes(data)


def as_json(value: Any) -> bytes:
    """As a careless program writes it: NaN as a word, text as UTF-8 where it can be."""
    try:
        return json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value).encode()


def assert_says(error: BaseException, *said: object) -> None:
    """An error that can be shown, and names what it is about."""
    text = str(error)
    assert text.strip() and "Traceback" not in text
    assert len(text) < 3000, len(text)
    for part in said:
        assert str(part) in text
