"""The tests of a problem, as one noun whatever file they come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Row = Mapping[str, Any]
"""What a prompt's line holds beside the prompt, with its reference under "answer"."""
MIB = 2**20


@dataclass(frozen=True)
class Stdin:
    """Tests of a whole program: what it reads, and what it should write.

    >>> Stdin((("1 2\\n", "3\\n"),)).lines
    False
    """

    pairs: tuple[tuple[str, str], ...]
    """(standard input, expected standard output) of each test."""
    lines: bool = False
    """Whether line breaks matter: so many lines, each of the same tokens. Else white space is white space."""
    numbers: bool = False
    """Whether two numbers of equal value are the same token ("1.0" and "1"), however the tolerance."""
    checker: str = ""
    """A Python program that judges instead: ``checker.py input.txt correct_output.txt solution_output.txt`` prints the
    score, 1 for a right answer. Empty: outputs are compared."""
    by_files: bool = False
    """Whether the program reads ``input.txt`` and writes ``output.txt`` in its working directory."""

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class Call:
    """A function call and the value that it should return.

    >>> Call((2, 3), 5).expected
    5
    """

    arguments: tuple[Any, ...]
    expected: Any
    either: bool = False
    """Whether the only item of ``expected`` is as right as ``expected`` itself: APPS wraps values so."""


@dataclass(frozen=True)
class Calls:
    """Tests of one function, or method of a class ``Solution``."""

    name: str
    calls: tuple[Call, ...]

    def __len__(self) -> int:
        return len(self.calls)


@dataclass(frozen=True)
class Asserts:
    """Tests that are Python code, as MBPP and HumanEval have them."""

    checks: tuple[str, ...]
    """Each a test: it fails when it raises."""
    setup: str = ""
    """Code in front of every test."""
    entry: str = ""
    """The function under test; empty: every function that a test calls and nobody defines."""

    def __len__(self) -> int:
        return len(self.checks)


@dataclass(frozen=True)
class Problem:
    """A problem's tests, its limits, and what its published grader adds to a program."""

    tests: Stdin | Calls | Asserts
    time_s: float | None = None
    """Processor seconds of one test; None where the problem sets no limit."""
    memory_bytes: int | None = None
    prefix: str = ""
    """Code that stands in front of the response: it is a continuation of it."""
    imports: bool = False
    """Whether the published grader imports the usual modules for every Python program."""
    language: Literal["", "python", "cpp"] = ""
    """The only language that the tests are for; empty: any."""
