"""The command lines that put a program behind bubblewrap's namespaces, and behind limits. Standard library alone."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_gspo.sandbox.interface import Limits
from megatron_gspo.sandbox.languages import HOME, WRITABLE, Language

SYSTEM = ("/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libexec", "/usr/include")
"""What a program sees of this machine, read-only, beside its interpreter."""
ROOTS = ("/bin", "/lib", "/lib32", "/lib64")
"""Names in the root directory: links into /usr, or directories on systems that keep them apart."""
HIDDEN = (
    *("--ro-bind", "/dev/null", "/proc/1/mem"),
    *("--perms", "0555", "--size", "4096", "--tmpfs", "/proc/1/task", "--remount-ro", "/proc/1/task"),
)
"""Of bubblewrap's first process, which is the program's user but is not behind its limits: its memory, by either name.
A program could write code of its own there."""
OPEN_FILES = 128
"""Descriptors a process."""
OWN = 2
"""Processes that count against a program's limit and are not its own: bubblewrap's first process, and the place that
the kernel keeps free."""


@dataclass(frozen=True)
class File:
    """A file that a program finds."""

    path: str
    fd: int
    """Open, and inherited by what is started; read from its beginning."""
    executable: bool = False


@dataclass(frozen=True)
class Settings:
    """What is the same for every run."""

    protected: bool
    """Behind namespaces."""
    bwrap: str
    python: str
    prefixes: tuple[str, ...]
    """Directories of the interpreter."""
    disk_bytes: int
    uid: int | None
    """The user to become first; None: stay who this is."""
    count_by_kernel: bool
    """Whether RLIMIT_NPROC counts a run's own processes alone."""


def environment(language: Language) -> dict[str, str]:
    """All of the environment that a program sees."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    paths = {"PATH": "/usr/bin:/bin", "HOME": HOME, "TMPDIR": "/tmp", "LANG": "C.UTF-8", "LC_ALL": "C.UTF-8"}
    return {**paths, **threads, **language.environment}


def limited(command: Sequence[str], limits: Limits, stack_bytes: int, *, count: bool) -> list[str]:
    """``command`` behind limits of each process; ``count``: and behind one of their number."""
    cpu_s = math.ceil(limits.cpu_s) + 1  # should nobody look: the sum over processes is what ends a run
    kinds = {
        "cpu": f"{cpu_s}:{cpu_s + 1}",
        "as": limits.memory_bytes,
        "fsize": limits.file_bytes,
        "nofile": OPEN_FILES,
        "core": 0,
        "stack": stack_bytes,
        "memlock": 0,
    }
    if count:
        kinds["nproc"] = limits.processes + OWN - 1
    return ["/usr/bin/prlimit", *(f"--{name}={value}" for name, value in kinds.items()), "--", *command]


def boxed(
    settings: Settings, command: Sequence[str], files: Sequence[File], *, status: int, seccomp: int, disk_bytes: int
) -> list[str]:
    """``command`` in namespaces of its own.

    Args:
        settings: of the sandbox.
        command: with its limits.
        files: what it finds.
        status: descriptor on which bubblewrap says how the program ended; the program does not have it.
        seccomp: descriptor of the filter.
        disk_bytes: what it may write.
    """
    box = [settings.bwrap, "--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]
    box += ["--hostname", "sandbox", "--uid", "65534", "--gid", "65534"]
    box += ["--proc", "/proc", "--dev", "/dev"]
    for writable in WRITABLE:
        box += ["--size", str(disk_bytes), "--tmpfs", writable]
    box += _system(settings.prefixes)
    for file in files:
        box += ["--perms", "0555" if file.executable else "0444", "--ro-bind-data", str(file.fd), file.path]
    box += HIDDEN
    box += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", HOME]
    return [*box, "--seccomp", str(seccomp), "--json-status-fd", str(status), "--", *command]


def _system(prefixes: Sequence[str]) -> Iterator[str]:
    for path in SYSTEM:
        if os.path.isdir(path):
            yield from ("--ro-bind", path, path)
    for path in ROOTS:
        if os.path.islink(path):
            yield from ("--symlink", os.readlink(path), path)
        elif os.path.isdir(path):
            yield from ("--ro-bind", path, path)
    for path in prefixes:
        if path != "/usr" and not path.startswith(SYSTEM):
            yield from ("--ro-bind", path, path)
