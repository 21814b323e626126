"""A command that runs other people's code is believed for what it says, whatever ends its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_gspo import supervise

WATCHED = """
import atexit, ctypes, os, signal, subprocess, sys, threading, time
from megatron_gspo import supervise
from megatron_gspo.supervise import interrupt_quietly, remove_afterwards, supervised
supervise.PATIENCE_S = 0.5
interrupt_quietly()
def action():
{body}
    return 0
status = supervised(action, "rank 3", launched={launched})
print("outcome", status, flush=True)
sys.exit(status)
"""


def program(body: str, launched: bool = False) -> list[str]:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return [sys.executable, "-c", WATCHED.format(body=lines, launched=launched)]


def ended(body: str, launched: bool = False) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a supervised process that does this."""
    done = subprocess.run(program(body, launched), capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


LEAVES = [
    "os._exit(0)",
    "ctypes.CDLL(None)._exit(0)",
    "threading.Thread(target=os._exit, args=(0,)).start(); time.sleep(9)",
]


@pytest.mark.parametrize("leave", LEAVES)
def test_a_process_that_leaves_with_status_0_and_without_a_word_has_failed(leave: str) -> None:
    status, _, said = ended(leave)
    assert status == 1
    assert said.splitlines() == [
        "error: rank 3 ended with exit status 0 before it was done: something in its process called _exit (the reward "
        "function, or a C library that it uses)"
    ]


@pytest.mark.parametrize("pretended", [2, 75])
def test_the_statuses_that_mean_something_are_not_believed_either(pretended: int) -> None:
    """2 would be a user's mistake, 75 a run that has saved and wants to be queued again."""
    assert ended(f"os._exit({pretended})")[0] == 1


@pytest.mark.parametrize(
    ("body", "status"),
    [("pass", 0), ("return 2", 2), ("return 75", 75), ("sys.exit(2)", 2), ("sys.exit()", 0), ("sys.exit('no')", 1)],
)
def test_what_a_process_says_is_its_status(body: str, status: int) -> None:
    assert ended(body)[:2] == (status, f"outcome {status}\n")


def test_an_error_that_nobody_foresaw_is_shown_and_is_a_failure() -> None:
    status, _, said = ended("raise KeyError('x')")
    assert status == 1 and said.strip().endswith("KeyError: 'x'")


@pytest.mark.parametrize("launched", [False, True])
def test_a_process_that_the_kernel_kills_is_named_here_or_by_the_launcher(launched: bool) -> None:
    status, _, said = ended("os.kill(os.getpid(), signal.SIGKILL)", launched)
    assert status == (-signal.SIGKILL if launched else 1)
    assert said == ("" if launched else "error: rank 3 was ended by SIGKILL: is the machine out of memory?\n")


def test_threads_that_outlive_the_work_neither_hold_up_the_end_nor_abort_it() -> None:
    """A thread that asks for the interpreter's lock while it is taken down is ended there; in C++ that is an abort."""
    begin = time.monotonic()
    status, _, said = ended("threading.Thread(target=time.sleep, args=(600,), name='judge').start()")
    assert time.monotonic() - begin < 200
    assert status == 0
    assert said == "warning: 1 threads of a reward or a library still run (judge): they end with the run\n"


def test_a_library_that_aborts_while_the_process_is_taken_down_does_not_undo_what_was_done() -> None:
    """As a C++ thread does that nobody has joined: "terminate called without an active exception"."""
    body = "libc = ctypes.CDLL(None)\nlibc.on_exit(libc.abort, None)"
    assert ended(body)[:2] == (0, "outcome 0\n")
    taken_down = [sys.executable, "-c", "import ctypes; libc = ctypes.CDLL(None); libc.on_exit(libc.abort, None)"]
    assert subprocess.run(taken_down).returncode == -signal.SIGABRT, "else this test shows nothing"


def test_functions_for_the_exit_run_and_one_that_hangs_is_given_up() -> None:
    body = "supervise.EXIT_FUNCTIONS_S = 0.5\natexit.register(time.sleep, 600)\n"
    status, printed, _ = ended(body + "atexit.register(print, 'bye', flush=True)")
    assert (status, printed) == (0, "bye\noutcome 0\n")


def test_what_a_killed_process_leaves_is_removed_and_ended(tmp_path: Path) -> None:
    """Directories and files that it named, and a process that it started in a session of its own."""
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "file").write_text("x")
    (tmp_path / "page.tmp").write_text("x")
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    body = (
        f"for name in ('directory', 'page.tmp', 'link'): remove_afterwards({str(tmp_path)!r} + '/' + name)\n"
        "orphan = subprocess.Popen(['sleep', '601'], start_new_session=True, stdout=subprocess.DEVNULL)\n"
        "print(orphan.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    _, printed, _ = ended(body)
    assert not Path(f"/proc/{printed.split()[0]}").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_directories_of_processes_that_were_all_killed_are_removed_by_the_next_one(tmp_path: Path) -> None:
    """Those that a living process locks stay, and so do new ones, which may not be locked yet, and others'."""
    names = ["mgspo-process-dead", "mgspo-ranks-dead", "mgspo-process-living", "mgspo-process-new", "another"]
    for name in names:
        (tmp_path / name).mkdir()
        age = 0 if name.endswith("new") else 100
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    lock = supervise.locked(tmp_path / "mgspo-process-living")
    done = subprocess.run(
        program("print(os.environ['TMPDIR'])"),
        env=os.environ | {"TMPDIR": str(tmp_path)},
        text=True,
        stdout=subprocess.PIPE,
    )
    os.close(lock)
    assert done.stdout.startswith(f"{tmp_path}/mgspo-process-"), "its own, which is gone"
    assert {path.name for path in tmp_path.iterdir()} == set(names[2:])


def test_more_than_a_pipe_holds_can_be_said(tmp_path: Path) -> None:
    """A run writes weights into a directory of a new name at every step."""
    body = f"for i in range(4000): remove_afterwards({str(tmp_path)!r} + f'/{{i:05d}}')"
    assert ended(body)[:2] == (0, "outcome 0\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_process_reaches_the_one_that_does_the_work(number: signal.Signals) -> None:
    body = (
        f"heard = []\nsignal.signal({int(number)}, lambda *_: heard.append(print('heard', flush=True)))\n"
        "print('up', flush=True)\nwhile not heard: time.sleep(0.02)"
    )
    with subprocess.Popen(program(body), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.stdout.read() == "heard\noutcome 0\n"


@pytest.mark.parametrize("to_all", [False, True])
def test_an_interrupt_ends_the_work_without_a_traceback(to_all: bool) -> None:
    """A terminal's Ctrl-C goes to all processes, ``kill -INT`` to one."""
    body = (
        "print('up', flush=True)\ntry:\n while True: time.sleep(0.1)"  # a signal just before a sleep waits for its end
        "\nfinally: raise ImportError('half imported')"
    )
    with subprocess.Popen(
        program(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        if to_all:
            os.killpg(process.pid, signal.SIGINT)
        else:
            process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 130 and said == ""


LATE = """
fork = os.fork
os.fork = lambda: (child := fork()) and (time.sleep(2.0) or child)
"""
"""The child is at work before its parent goes on."""


@pytest.mark.parametrize("late", ["", LATE], ids=["", "while its supervisor comes late"])
def test_the_work_ends_when_its_launcher_is_killed(late: str) -> None:
    *start, source = program("print(os.getpid(), flush=True); time.sleep(600)", launched=True)
    command = [*start, source.replace("status = supervised", f"{late}status = supervised")]
    launcher = f"import subprocess; p = subprocess.Popen({command!r}); p.wait()"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


GONE = """
place = supervise._own_place
supervise._own_place = lambda: print(os.getpid(), flush=True) or time.sleep(2.0) or place()
"""
"""Its launcher goes before the kernel is asked to tell of that."""


def test_the_work_ends_when_its_launcher_is_gone_before_it_begins() -> None:
    *start, source = program("time.sleep(600)", launched=True)
    command = [*start, source.replace("status = supervised", f"{GONE}status = supervised")]
    launcher = f"import subprocess; p = subprocess.Popen({command!r}); p.wait()"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        supervisor = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{supervisor}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_of_the_work_that_returns_from_it_says_nothing_for_it() -> None:
    assert ended("child = os.fork()\nif child: os.waitpid(child, 0); os._exit(0)")[0] == 1
