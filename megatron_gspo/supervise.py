"""A process that watches over the one that does the work, and believes what that one says and not how it ends.

Training and grading run other people's code: reward functions, and C libraries under them. Such code can end its
process with ``_exit(0)``, which from outside is a success; and the kernel can end it for want of memory, and then
nobody removes what it has left. So the work is done in a forked child. Its parent imports nothing more, passes signals
on, and waits. What the child writes into memory that both have is its outcome; a child that ends without a word has
failed.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_gspo.hooks import run_at_end
from megatron_gspo.limits import name_of

STORE = "MEGATRON_GSPO_STORE"
"""Environment variable: the file in which ranks of one machine find each other, in a directory of their own."""
FAILED, INTERRUPTED = 1, 130
PATIENCE_S = 5.0
"""Until processes that outlive the child are killed: what it started and did not end, and local servers, which notice
within a second that it is gone."""
EXIT_FUNCTIONS_S = 10.0
"""That functions registered with ``atexit`` may take."""
STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to finish its outer step, save and end. Schedulers send the first before they preempt a job,
and the second where they are told to, before a time limit."""
IMPATIENT = 4
"""Interrupts that kill the child. Of one Ctrl-C a rank may get two: the terminal's and its launcher's."""
PREFIXES = OF_PROCESS, OF_RANKS = "mgspo-process-", "mgspo-ranks-"
"""Of directories that a living process locks: for temporary files, and where ranks meet."""
SETTLED_S = 60.0
"""Age from which one that nobody locks is abandoned."""
WORDS_BYTES = 4 * 2**20
"""Of the memory in which the child says what it does; pages that are not written take none."""
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_WATCHED = {getattr(signal, f"SIG{name}") for name in ("CHLD", "TERM", "INT", "HUP", "QUIT", "USR1", "USR2")}
_words: tuple[int, mmap.mmap] | None = None
"""In a supervised child: its process id, and where it says what it does. No descriptor: a reward may close all."""
_to_remove: set[str] = set()
_interrupted = False
_asked_early: list[str] = []


def supervised(action: Callable[[], int], who: str, *, launched: bool = False) -> int:
    """What ``action`` returns, called in a child; 1, with a line that names ``who``, when the child ends without it.

    ``launched``: this process was started by a launcher that says which signal ended it. It is then ended by the signal
    that ended the child, and the child is killed when the launcher is gone. The calling process must have one thread.
    """
    launcher, parent = os.getppid(), os.getpid()
    words = mmap.mmap(-1, WORDS_BYTES)
    place, lock = _own_place()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the child leaves behind becomes a child of this process
    if launched:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)  # a fork does not pass it on
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        die_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(lock)
        _live_in(place)
        _work(action, words)
    if launched and os.getppid() != launcher:  # it was gone before the kernel was asked to tell of it
        os.kill(child, signal.SIGKILL)
    status = _wait(child, launcher if launched else None)
    said = _read(words)
    _end_what_is_left()
    for path in (*said["remove"], place):
        _remove(Path(path))
    if launched and os.getppid() != launcher and STORE in os.environ:  # which it could not remove itself
        shutil.rmtree(Path(os.environ[STORE]).parent, ignore_errors=True)
    if said["at_end"] is not None and (STORE not in os.environ or os.getppid() != launcher):
        run_at_end(status=FAILED if said["end"] is None else int(said["end"]), **said["at_end"])
    if said["end"] is not None:
        return int(said["end"])
    return _unsaid(status, who, launched)


def end(status: int) -> NoReturn:
    """Says that the work is done with this exit status, and ends the process: a supervised child's last act.

    The interpreter is not taken down: threads that still run, a reward's or a library's, would be ended wherever they
    ask for its lock, and where that is inside C++ the process aborts ("terminate called without an active exception").
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    _say({"end": status})
    left = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread() and not _ours(t)]
    if left and status == 0:
        names = ", ".join(thread.name for thread in left[:3])
        _print(f"warning: {len(left)} threads of a reward or a library still run ({names}): they end with the run")
    timer = threading.Timer(EXIT_FUNCTIONS_S, os._exit, [status])
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # no thread can be started any more
        timer.start()
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    os._exit(status)


def interrupt_quietly() -> None:
    """Has the first Ctrl-C raise KeyboardInterrupt, and others do nothing while that is being handled.

    It may strike anywhere, in the import of a library too: what that makes of it is not printed.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a shell's background job
        signal.signal(signal.SIGINT, _interrupt)


def was_interrupted() -> bool:
    """Whether Ctrl-C has struck since ``interrupt_quietly``."""
    return _interrupted


def listen_early() -> None:
    """Has a SIGUSR1 be remembered that comes while a rank starts: whoever sends it wants a saved run, and a start takes
    a minute. (SIGTERM ends it at once, as it does a rank that hangs there.)"""
    _asked_early.clear()
    signal.signal(signal.SIGUSR1, lambda number, frame: _asked_early.append(signal.Signals(number).name))


def asked_early() -> str:
    """The signal that has come since; empty where none has."""
    return next(iter(_asked_early), "")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    global _interrupted
    _interrupted = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.unraisablehook = lambda unraisable: None
    raise KeyboardInterrupt


def remove_afterwards(path: str | Path) -> None:
    """Has the supervisor remove a file or directory when this process is gone and has not done so (it was killed)."""
    place = str(Path(path).absolute())
    if place not in _to_remove:
        _to_remove.add(place)
        _say({"remove": place})


def run_afterwards(command: str, timeout_s: float, run_dir: str) -> None:
    """Has the supervisor run ``train.on_end`` when this process has ended, where no launcher of ours will."""
    _say({"at_end": {"command": command, "timeout_s": timeout_s, "run_dir": run_dir}})


def is_supervised() -> bool:
    """Whether this process is the child that does the work."""
    return _words is not None and _words[0] == os.getpid()


def first_to_say(key: str) -> bool | None:
    """Whether no rank of this run on this machine has asked before; None where they have no directory of their own."""
    if STORE not in os.environ:
        return None
    try:
        os.close(os.open(Path(os.environ[STORE]).with_name(f"said-{key}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # the directory went with the launcher
        return True
    return True


def die_with_parent(parent: int | None = None) -> None:
    """Asks Linux to kill this process when the one that started it is gone: else it would go on, and servers and
    GPUs with it. ``parent``: its process id, to notice that it is gone already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _own_place() -> tuple[str, int]:
    """A new directory for the child's temporary files, and a descriptor that locks it while this process lives; those
    of processes that were killed are removed."""
    remove_abandoned()
    place = tempfile.mkdtemp(prefix=OF_PROCESS)  # 0700
    return place, locked(Path(place))


def remove_abandoned() -> None:
    """Removes the temporary directories of processes of this user that were killed before they could."""
    for old in [old for prefix in PREFIXES for old in Path(tempfile.gettempdir()).glob(f"{prefix}*")]:
        with contextlib.suppress(OSError):  # another user's, in use, or gone
            if time.time() - old.stat().st_mtime > SETTLED_S:  # else perhaps not locked yet
                os.close(locked(old))
                _remove(old)


def locked(directory: str | Path) -> int:
    """A descriptor that locks a directory. Raises OSError when another process does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _live_in(place: str) -> None:
    """Has this process and what it starts make temporary files in ``place``, which goes with it. But what torch
    compiles, where a user has not said where, stays for the next run."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    os.environ["TMPDIR"] = tempfile.tempdir = place


def _work(action: Callable[[], int], words: mmap.mmap) -> NoReturn:
    global _words
    _words = os.getpid(), words
    status = FAILED
    try:
        status = action()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else FAILED if error.code else 0
    except BaseException as error:
        status = INTERRUPTED if _interrupted or isinstance(error, KeyboardInterrupt) else FAILED
        if status == FAILED:
            traceback.print_exc()
    finally:
        if not is_supervised():  # a child of the child, which has returned here
            os._exit(FAILED)
        end(status)


def _wait(child: int, launcher: int | None) -> int:
    """The wait status of ``child``; meanwhile passes on to it what is sent to this process. Whoever interrupts
    ``IMPATIENT`` times does not want to wait for it any more."""
    interrupts = 0
    while True:
        got = signal.sigwaitinfo(_WATCHED)
        interrupts += got.si_signo == signal.SIGINT
        if got.si_signo == signal.SIGCHLD:
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == child:
                    return found[1]
        elif interrupts >= IMPATIENT or (launcher is not None and os.getppid() != launcher):
            os.kill(child, signal.SIGKILL)
        elif got.si_code <= 0:  # sent by a process; a terminal's goes to the child as well
            os.kill(child, got.si_signo)


def _end_what_is_left() -> None:
    """Waits for processes that the child has left, and kills those that stay."""
    deadline = time.monotonic() + PATIENCE_S
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(ChildProcessError):  # there is none
        while True:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
            if time.monotonic() > deadline:
                for process in map(int, own.read_text().split()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            time.sleep(0.02)


def _unsaid(status: int, who: str, launched: bool) -> int:
    """The exit status of a child that ended without a word, which is said here."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    first = first_to_say("failure")  # other ranks fail because this one is missing
    if number and launched:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the child has left one
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
    if number:
        _print(f"error: {who} was ended by {name_of(number)}")
        return 128 + number if number in (signal.SIGINT, signal.SIGTERM) else FAILED
    if first is not False:
        _print(
            f"error: {who} ended with exit status {os.WEXITSTATUS(status)} before it was done: something in its "
            f"process called _exit (the reward function, or a C library that it uses)"
        )
    return FAILED


def _read(words: mmap.mmap) -> dict[str, Any]:
    """What the child has said: its exit status, if it did, what is to be run, and what is to be removed."""
    said: dict[str, Any] = {"end": None, "at_end": None, "remove": []}
    for line in words[: words.find(b"\0")].splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            record = json.loads(line)
            said |= {name: record.get(name, said[name]) for name in ("end", "at_end")}
            said["remove"] += [record["remove"]] if "remove" in record else []
    return said


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _say(record: dict[str, Any]) -> None:
    if _words is None or not is_supervised():
        return
    line, words = json.dumps(record).encode() + b"\n", _words[1]
    if words.tell() + len(line) < WORDS_BYTES - (0 if "end" in record else 100):
        words.write(line)


def _ours(thread: threading.Thread) -> bool:
    """Threads of the background writers: what they write is given up with the run."""
    return thread.name.startswith(("checkpoint", "export"))


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(option, int(value), 0, 0, 0)
