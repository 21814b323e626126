"""An error that comes from a limit of the machine or the shell is one line with the limit and its value."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest

from megatron_gspo.limits import explain


def under(kind: str, value: int, code: str) -> str:
    """What ``explain`` says of what this code raises under a limit, in a process of its own."""
    program = f"""
import resource, threading
from megatron_gspo.limits import explain
import ctypes, mmap, os, tempfile, time
resource.setrlimit(resource.RLIMIT_{kind}, ({value}, {value}))
try:
    {code}
except BaseException as error:
    line = explain(error)
resource.setrlimit
os.write(1, line.encode())
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\n" not in done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("kind", "value", "code", "said"),
    [
        ("NOFILE", 20, "kept = [open('/dev/null') for _ in range(30)]", r"too many open files .*: 20 \(ulimit -n\)"),
        ("NOFILE", 20, "kept = [os.pipe() for _ in range(30)]", r"too many open files .*: 20 \(ulimit -n\)"),
        ("AS", 10**9, "bytearray(10**10)", r"out of memory: its address space is limited to 1\.00 GB \(ulimit -v\)"),
        ("AS", 10**9, "mmap.mmap(-1, 10**10)", r"out of memory .*1\.00 GB \(ulimit -v\)"),
        (
            "AS",
            10**8,
            "[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(99)]",
            r"no thread or process can be started \(can't start new thread\): .* limited to 0\.10 GB \(ulimit -v\)",
        ),
    ],
)
def test_what_a_limit_makes_fail_names_the_limit(kind: str, value: int, code: str, said: str) -> None:
    line = under(kind, value, code)
    assert re.match(said, line), line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried"),
            "mem",
        ),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "out of memory (libtorch"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "out of GPU memory (CUDA"),
        (RuntimeError("socket: Too many open files"), "too many open files (socket"),
        (MemoryError(), "out of memory: the machine, or its container, has no more"),
    ],
)
def test_what_libraries_say_of_a_limit_is_understood(error: Exception, said: str) -> None:
    assert said in (explain(error) or "")


def test_a_limit_is_found_behind_what_was_raised_because_of_it() -> None:
    error = RuntimeError("gloo: connect failed")
    error.__cause__ = OSError(24, os.strerror(24))
    assert "too many open files" in (explain(error) or "")
    assert explain(RuntimeError("gloo: connect failed")) is None
    assert explain(FileNotFoundError(2, "no such file")) is None


def in_a_process(code: str, prepare: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=prepare, timeout=300)


def test_the_soft_limit_of_open_files_is_raised_and_a_hard_one_that_is_too_low_is_refused() -> None:
    code = (
        "import resource; from megatron_gspo.limits import allow_open_files\n"
        "print(repr(allow_open_files()), resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    )
    raised = in_a_process(code, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 1024)))
    assert raised.stdout == "'' 1024\n"
    refused = in_a_process(code, lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 100)))
    assert refused.stdout.startswith("'100 open files are allowed (ulimit -Hn), and a rank needs 256: raise")


def test_a_command_without_the_memory_for_its_libraries_is_one_line() -> None:
    code = "import sys; from megatron_gspo.cli import main; sys.exit(main(['parity', '--max-ranks', '1']))"
    done = in_a_process(code, lambda: resource.setrlimit(resource.RLIMIT_AS, (300_000_000, 300_000_000)))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: out of memory (") and line.endswith("limited to 0.30 GB (ulimit -v)")


def test_a_crash_under_a_limit_names_the_limit() -> None:
    code = (
        "import os, resource, sys; from megatron_gspo.supervise import supervised\n"
        "sys.exit(supervised(os.abort, 'rank 2'))"
    )
    done = in_a_process(code, lambda: resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9)))
    assert done.returncode == 1
    said = "error: rank 2 was ended by SIGABRT: its address space is limited to 1.00 GB (ulimit -v)"
    assert done.stderr.splitlines()[-1] == said


def test_a_machine_without_a_temporary_directory_is_one_line() -> None:
    """tempfile tries the working directory, too: here nothing can be made in any of them."""
    code = (
        "import sys, tempfile\nfrom megatron_gspo import cli, supervise\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc/nowhere']\n"
        "sys.argv = ['megatron-gspo', 'eval', 'nothing']; sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "No usable temporary directory" in line
