"""The table of layouts that tests of programs are published in. docs/code-rewards.md is this table to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_gspo.rewards.cases import apps, codeforces, humaneval, livecodebench, mbpp
from megatron_gspo.rewards.cases.tests import Problem, Row


@dataclass(frozen=True)
class TestsFormat:
    """An entry of the table."""

    __test__ = False  # no test of pytest's

    read: Callable[[Row], Problem]
    """Raises ValueError, in one line that says which field is wrong."""
    recognise: Callable[[Row], bool]
    """Whether "auto" takes a row for one of this layout."""


FORMATS: dict[str, TestsFormat] = {
    "livecodebench": TestsFormat(livecodebench.read, livecodebench.recognise),
    "codeforces": TestsFormat(codeforces.read, codeforces.recognise),
    "humaneval": TestsFormat(humaneval.read, humaneval.recognise),
    "mbpp": TestsFormat(mbpp.read, mbpp.recognise),
    "apps": TestsFormat(apps.read, apps.recognise),
}
"""In the order in which "auto" asks. Adding a layout is one file and one entry."""


def read_problem(row: Row, name: str = "auto") -> Problem:
    """A row's tests. Raises ValueError, in one line, for a row without tests that can be read."""
    if name == "auto":
        name = next((known for known, entry in FORMATS.items() if entry.recognise(row)), "")
    if not name:
        fields = ", ".join(key for key, value in row.items() if value not in (None, ""))
        raise ValueError(f"the row has no tests in a layout that is known ({', '.join(FORMATS)}); it has {fields:.200}")
    try:
        return FORMATS[name].read(row)
    except ValueError as error:
        raise ValueError(f'{error} (tests read as "{name}")') from None
