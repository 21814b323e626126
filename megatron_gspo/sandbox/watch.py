"""What a running program and all that it has started take together, read from /proc. Standard library alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_gspo.sandbox.languages import WRITABLE

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
INODE = 1024
"""Bytes of memory that a file in memory takes beside its content, about."""
_CPU, _THREADS = slice(11, 15), 17
"""In /proc/PID/stat behind the name: utime, stime, cutime, cstime (proc(5) fields 14 to 17); num_threads (20)."""


@dataclass(frozen=True)
class Usage:
    """What is taken at a moment."""

    cpu_s: float
    """Processor time since the start, of those that have ended too."""
    memory_bytes: int
    """An upper bound of it: pages that several share count for each."""
    threads: int


class Watch:
    """Looks at the processes of one run."""

    def members(self) -> Iterator[int]:
        """A descriptor of /proc/PID of each process; closed when the next one is asked for."""
        raise NotImplementedError

    def written(self) -> int:
        """Bytes of files in memory."""
        return 0

    def usage(self) -> Usage:
        """All of them together."""
        ticks = pages = threads = 0
        for process in self.members():
            with contextlib.suppress(OSError, ValueError):  # it has ended
                fields = _read(process, "stat").rpartition(b")")[2].split()
                ticks += sum(map(int, fields[_CPU]))
                threads += int(fields[_THREADS])
                pages += int(_read(process, "statm").split()[1])
        return Usage(ticks / TICK, pages * PAGE + self.written(), threads)

    def memory(self) -> int:
        """Bytes, with what several processes share counted once. It takes longer than ``usage``."""
        kibibytes = 0
        for process in self.members():
            with contextlib.suppress(OSError, ValueError):
                for line in _read(process, "smaps_rollup").splitlines():
                    name, *values = line.split()
                    if name in (b"Pss_Anon:", b"Pss_Shmem:"):
                        kibibytes += int(values[0])
        return kibibytes * 1024 + self.written()

    def close(self) -> None:
        """Gives its descriptors back."""


class NamespaceWatch(Watch):
    """Of a program behind namespaces: all processes that its own /proc has, whatever they did to be alone."""

    def __init__(self, first: int) -> None:
        """``first``: process id of the namespace's first process. Raises OSError before all is mounted."""
        root = f"/proc/{first}/root"
        with contextlib.ExitStack() as stack:
            self._proc = os.open(f"{root}/proc", os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, self._proc)
            if os.fstat(self._proc).st_dev == os.stat("/proc").st_dev:
                raise FileNotFoundError("the namespace has no /proc yet")
            self._disks = []
            for path in WRITABLE:
                self._disks.append(os.open(root + path, os.O_RDONLY | os.O_DIRECTORY))
                stack.callback(os.close, self._disks[-1])
            self._stack = stack.pop_all()

    def members(self) -> Iterator[int]:
        """As a ``Watch`` has it."""
        for name in os.listdir(self._proc):
            if name.isdigit():
                with contextlib.suppress(OSError):
                    yield from _opened(name, self._proc)

    def written(self) -> int:
        """As a ``Watch`` has it."""
        taken = 0
        for disk in self._disks:
            at = os.fstatvfs(disk)
            taken += (at.f_blocks - at.f_bfree) * at.f_frsize + (at.f_files - at.f_ffree) * INODE
        return taken

    def close(self) -> None:
        """As a ``Watch`` has it."""
        self._stack.close()


class ChildrenWatch(Watch):
    """Of a program without namespaces: all that came from this process, to which orphans are given."""

    def members(self) -> Iterator[int]:
        """As a ``Watch`` has it."""
        waiting, seen = children(os.getpid()), set[int]()
        while waiting:
            pid = waiting.pop()
            if pid not in seen:
                seen.add(pid)
                waiting += children(pid)
                with contextlib.suppress(OSError):
                    yield from _opened(f"/proc/{pid}", None)


def children(pid: int) -> list[int]:
    """Process ids of the children of all threads of a process; none where it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    return found


def _opened(name: str, directory: int | None) -> Iterator[int]:
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _read(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY, dir_fd=directory)
    try:
        return os.read(fd, 8192)
    finally:
        os.close(fd)
