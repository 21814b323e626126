"""The languages that programs may be written in: an entry each."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_gspo.sandbox.interface import MIB, Limits

HOME = "/box"
"""Working directory inside: the program, its files, and what it writes."""
WRITABLE = (HOME, "/tmp", "/dev/shm")
"""Directories in memory that a program may write to."""
COMPILE = Limits(
    wall_s=60.0,
    cpu_s=30.0,
    memory_bytes=2048 * MIB,
    processes=24,
    file_bytes=192 * MIB,
    output_bytes=192 * MIB,
)
"""Of compiling, whatever the limits of the runs are."""


@dataclass(frozen=True)
class Language:
    """How a program is compiled and run, in the directory ``HOME``."""

    file: str
    """Name of its text."""
    run: tuple[str, ...]
    """Command; ``{python}`` is the interpreter of ``sandbox.python``."""
    sample: str
    """A program that writes 42 on a line: ``sandbox check`` runs it."""
    compile: str = ""
    """Shell command that turns ``file`` into ``binary``; ``{headers}`` is the directory of precompiled ones. Empty:
    the text itself is run."""
    binary: str = ""
    header: str = ""
    """Shell command that writes a precompiled header to ``precompiled``; for programs with ``header_words``."""
    header_words: bytes = b""
    precompiled: str = ""
    """Where it must stand, under ``{headers}``."""
    stack_bytes: int = 8 * MIB
    """Of the first thread, and of each further one unless a program says otherwise."""
    out_of_memory: bytes = b"\0"
    """What stands on standard error when a program has given up for want of memory."""
    environment: dict[str, str] = field(default_factory=dict)


HEADERS = "/headers"
_COMPILER = f"g++ -std=gnu++17 -O2 -pipe -w -I{HEADERS}"

LANGUAGES = {
    "python": Language(
        file="main.py",
        run=("{python}", "-s", "main.py"),
        sample="print(6 * 7)",
        out_of_memory=b"MemoryError",
        environment={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
    ),
    "cpp": Language(
        file="main.cpp",
        run=(f"{HOME}/main",),
        sample="#include <iostream>\nint main() { std::cout << 6 * 7 << std::endl; }",
        compile=f"{_COMPILER} -o main main.cpp",
        binary="main",
        header=f"echo '#include <bits/stdc++.h>' >all.h && {_COMPILER} -x c++-header -o all.gch all.h",
        header_words=b"bits/stdc++.h",
        precompiled="bits/stdc++.h.gch",
        stack_bytes=64 * MIB,
        out_of_memory=b"std::bad_alloc",
    ),
}
"""By the name that a ``Program`` says."""
