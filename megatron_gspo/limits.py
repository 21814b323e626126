"""What an error means that comes from a limit of the machine or of the shell: memory, open files, threads."""

from __future__ import annotations

import errno
import re
import resource
import signal
from collections.abc import Iterator

FILES = re.compile("Too many open files")
MEMORY = re.compile(
    "can't allocate memory|Cannot allocate memory|std::bad_alloc|cannot map segment|failed to map segment"
)
"""Of torch's allocator, of C++, and of the loader of shared libraries."""
GPU_MEMORY = re.compile("CUDA out of memory")
THREADS = re.compile("can't start new thread|pthread_create failed|Resource temporarily unavailable")
FEWEST_FILES, MANY_FILES = 256, 65536
"""Open files without which a rank does not get far (sockets to other ranks and to servers, libraries, checkpoints), and
how many one is allowed where the hard limit permits."""


def explain(error: BaseException) -> str | None:
    """One line that names the limit and its value, where ``error`` or what caused it comes from one; else None."""
    for each in _chain(error):
        text, number = " ".join(str(each).split()), getattr(each, "errno", None)
        detail = f" ({text[:300]})" if text else ""
        if number in (errno.EMFILE, errno.ENFILE) or FILES.search(text):
            return f"too many open files{detail}: {_value('NOFILE', 'ulimit -n')} are allowed: raise that"
        if GPU_MEMORY.search(text):
            return f"out of GPU memory{detail}: fewer tokens in a micro-batch, or a layout with more ranks, need less"
        if isinstance(each, MemoryError) or number == errno.ENOMEM or MEMORY.search(text):
            limited = _address_space()
            return f"out of memory{detail}{limited or ': the machine, or its container, has no more'}"
        if THREADS.search(text):
            allowed = f"{_value('NPROC', 'ulimit -u')} are allowed{_address_space()}"
            return f"no thread or process can be started{detail}: {allowed}"
    return None


def allow_open_files() -> str:
    """Raises this process's limit of open files as far as the hard one permits; what to say if that is too low, else
    nothing. Processes that it starts inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY or soft >= FEWEST_FILES:
        return ""
    return f"{soft} open files are allowed (ulimit -Hn), and a rank needs {FEWEST_FILES}: raise the hard limit"


def name_of(number: int) -> str:
    """A signal's name, with the limit that it may mean."""
    name = signal.Signals(number).name
    if number == signal.SIGKILL:
        return f"{name}: is the machine out of memory?"
    if number == signal.SIGXCPU:
        return f"{name}: it has had its processor time ({_value('CPU', 'ulimit -t')} seconds)"
    crashed = number in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS)
    return f"{name}{_address_space()}" if crashed else name


def _address_space() -> str:
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return (
        "" if soft == resource.RLIM_INFINITY else f": its address space is limited to {soft / 1e9:.2f} GB (ulimit -v)"
    )


def _value(name: str, command: str) -> str:
    soft = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[0]
    return f"{'as many as the machine takes' if soft == resource.RLIM_INFINITY else soft} ({command})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
