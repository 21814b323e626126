"""What a hostile program is, and what must come of it."""

from __future__ import annotations

import pwd
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_gspo.sandbox import Limits, Verdict

MIB = 2**20
LIMITS = Limits(
    wall_s=3.0,
    cpu_s=1.0,
    memory_bytes=160 * MIB,
    processes=16,
    file_bytes=4 * MIB,
    output_bytes=65536,
)
"""Of every hostile program."""
DISK_MB = 16
SECRET = "canary-7d1f"
HOME = pwd.getpwuid(0).pw_dir
"""What nobody may read: root's."""
"""What files outside, the environment and a listening process of the host hold; no program may see it."""
OK, CRASHED, TIME, MEMORY, OUTPUT = Verdict.OK, Verdict.CRASHED, Verdict.TIME, Verdict.MEMORY, Verdict.OUTPUT
COMPILE = Verdict.COMPILE


@dataclass(frozen=True)
class Case:
    """A program, and the verdicts that it may get. ``Verdict.FAILED`` is never one: no program can make it."""

    name: str
    source: str
    verdicts: frozenset[Verdict]
    says: bytes | None = None
    """All of its standard output, where that is known; it stands for what it could and could not do."""
    status: int | None = None
    """Its exit status, where that is known."""
    language: str = "python"


def case(
    name: str,
    source: str,
    *verdicts: Verdict,
    says: str | bytes | None = None,
    status: int | None = None,
    language: str = "python",
) -> Case:
    """A case; ``source`` may be indented."""
    known = says.encode() if isinstance(says, str) else says
    return Case(name, textwrap.dedent(source), frozenset(verdicts), known, status, language)


def each(name: str, template: str, values: Iterable[object], *verdicts: Verdict, says: str | None = None) -> list[Case]:
    """A case for each value, which stands for ``@`` in the program."""
    return [
        case(f"{name}/{value}".replace("\n", " ")[:80], template.replace("@", repr(value)), *verdicts, says=says)
        for value in values
    ]


def denied(name: str, setup: str, attempts: Iterable[str]) -> list[Case]:
    """A case for each statement, which must raise an error of the system or return -1, and nothing else."""
    template = """
        import os, sys, ctypes, socket, signal, resource, struct, fcntl
        libc = ctypes.CDLL(None, use_errno=True)
        {setup}
        def attempt():
            result = {attempt}
            return 'failed' if result == -1 else f'DONE: {{result!r}}'
        try:
            print(attempt())
        except (OSError, ValueError):
            print('failed')
    """
    return [
        case(
            f"{name}/{attempt}"[:80],
            textwrap.dedent(template).format(setup=setup, attempt=attempt),
            OK,
            says="failed\n",
        )
        for attempt in attempts
    ]
