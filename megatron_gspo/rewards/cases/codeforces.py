"""open-r1/codeforces: ``official_tests`` (and ``generated_tests``, where they have been put in) of {"input",
"output"}, else ``examples``; ``time_limit`` in seconds, ``memory_limit`` in megabytes, ``input_mode`` "stdio" or
"file", ``generated_checker``.

``official_tests_complete`` false means that Codeforces has cut long tests off its page: what is there is what is run.
"""

from __future__ import annotations

from typing import Any

from megatron_gspo.rewards.cases.fields import as_list, as_text, code, memory, seconds
from megatron_gspo.rewards.cases.tests import Problem, Row, Stdin

TESTS = ("official_tests", "generated_tests")


def recognise(row: Row) -> bool:
    """Whether a row is of this layout."""
    return "official_tests" in row or "generated_checker" in row or ("examples" in row and "input_mode" in row)


def read(row: Row) -> Problem:
    """Raises ValueError, also for a problem whose program talks with a judge."""
    if row.get("interaction_format"):
        raise ValueError("the problem is interactive: its tests are a program that answers")
    mode = row.get("input_mode") or "stdio"
    if mode not in ("stdio", "file"):
        raise ValueError(f'input_mode = {mode!r:.40} is neither "stdio" nor "file"')
    cases = [case for name in TESTS for case in listed(row, name)] or listed(row, "examples")
    if not cases:
        raise ValueError("there is neither an official test nor an example")
    pairs = tuple((as_text(case.get("input"), "input"), as_text(case.get("output"), "output")) for case in cases)
    tests = Stdin(pairs, checker=code(row, "generated_checker"), by_files=mode == "file")
    return Problem(tests, seconds(row), memory(row))


def listed(row: Row, name: str) -> list[Any]:
    """A list of tests; empty when it is absent, or a count (``generated_tests`` of the published files is one)."""
    value = row.get(name)
    if value is None or isinstance(value, int):
        return []
    cases = as_list(value, name)
    if not all(hasattr(case, "get") for case in cases):
        raise ValueError(f"{name} holds something that is no test")
    return cases
