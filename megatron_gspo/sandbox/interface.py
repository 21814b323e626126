"""What a sandbox takes and gives: a program, its inputs and limits; a verdict an input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Protocol, Self

MIB = 2**20


class Verdict(StrEnum):
    """How a program ended. Whether its output is right is not for a sandbox to say."""

    OK = "ok"
    """By itself, with exit status 0."""
    CRASHED = "crashed"
    """With another exit status, or by a signal."""
    TIME = "time"
    """It was ended after ``Limits.wall_s``, or after ``Limits.cpu_s`` of processor time."""
    MEMORY = "memory"
    """It took more than ``Limits.memory_bytes``, or gave up for want of memory."""
    OUTPUT = "output"
    """It was ended after ``Limits.output_bytes`` of output."""
    COMPILE = "compile_error"
    """It was refused by the compiler, or compiling exceeded a limit; ``Outcome.stderr`` has the compiler's words."""
    FAILED = "sandbox_failure"
    """The sandbox could not run it: says nothing about the program. ``Outcome.stderr`` has the reason."""


@dataclass(frozen=True)
class Program:
    """A program to run.

    >>> Program("python", "print(int(input()) + 1)").language
    'python'
    """

    language: str
    """An entry of ``sandbox.languages.LANGUAGES``: "python", "cpp"."""
    source: str
    """Its text. What is no text (a lone surrogate) is a compile error."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files that it may read, by name within its working directory: "data/table.txt"."""


@dataclass(frozen=True)
class Limits:
    """What a run may take: all that a program starts, together, where nothing else is said.

    Compiling has limits of its own (``languages.COMPILE``).
    """

    wall_s: float = 10.0
    """Seconds from its start."""
    cpu_s: float = 6.0
    """Seconds of processor time."""
    memory_bytes: int = 512 * MIB
    """Bytes of memory: address space of each process, and pages of all of them with the files that they write."""
    processes: int = 32
    """Processes and threads at once."""
    file_bytes: int = 16 * MIB
    """Bytes of each file that it writes."""
    output_bytes: int = MIB
    """Bytes on standard output and, as many again, on standard error."""


@dataclass(frozen=True)
class Outcome:
    """What came of one run.

    >>> Outcome(Verdict.OK, 0, b"43\\n", b"", wall_s=0.02, cpu_s=0.01).verdict
    <Verdict.OK: 'ok'>
    """

    verdict: Verdict
    status: int | None
    """The exit status, 128 and the signal's number for one that a signal ended (as a shell counts); None where there
    is none: ended at a limit, not compiled, not run."""
    stdout: bytes
    """At most ``Limits.output_bytes``, and so is ``stderr``."""
    stderr: bytes
    wall_s: float
    """Seconds from its start to its end, without the time that it waited for its turn."""
    cpu_s: float
    """Seconds of processor time, of all that it started; 0.0 where the backend does not tell."""


class Sandbox(Protocol):
    """Runs programs that nobody trusts. An asynchronous context manager: inside it, any number of runs at once."""

    async def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        limits: Limits,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        """Compiles once, and runs once per input, in order.

        Args:
            program: what to run.
            inputs: what stands on standard input, a run each. Each run begins with the files of ``program`` and
                sees nothing of the runs before it.
            limits: of each run.
            go_on: called with the index and outcome of each run; False ends it there. None: all inputs are run.

        Returns the outcomes of the inputs that were run. A program that does not compile has one, ``COMPILE``. What
        the sandbox itself could not do is ``FAILED``, never an exception, and never the program's fault.
        Raises ConfigError for a language that there is not, and for names of files that leave the directory.
        """
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
