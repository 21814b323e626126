"""What a user's reward function may do to the process that calls it, noticed when its calls are over.

It runs inside the trainer, with threads and sockets of torch beside it. Its working directory is given back, a forked
child of it that comes back is ended, and descriptors that were not its own to close end the process: ranks that talk
over a closed socket would wait for each other for ever.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import numpy as np

from megatron_gspo.errors import RewardError
from megatron_gspo.supervise import end, first_to_say, is_supervised, was_interrupted

STANDARD = {0: "standard input", 1: "standard output", 2: "standard error"}
CONNECTIONS = ("socket:", "pipe:", "anon_inode:")
"""How Linux names descriptors through which this process talks to others."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
"""Those that a run is asked with to save and to end, and that tell it of its children."""

Open = dict[int, str]
"""Descriptor -> what it is."""


STATUS = "/proc/self/status"


def _umask() -> int | None:
    """Read without setting it: other threads make files meanwhile. None where the system does not tell (gVisor)."""
    with open(STATUS) as status:
        return next((int(line.split()[1], 8) for line in status if line.startswith("Umask:")), None)


def _handlers() -> dict[int, Any]:
    """What Python does at each signal; without those that C code has set, which cannot be named."""
    return {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}


def _set_handlers(handlers: dict[int, Any]) -> None:
    """Raises ValueError on another thread than the main one."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _of_torch(look: str) -> Any:
    """A setting of torch; None where nobody has imported it."""
    return getattr(sys.modules["torch"], look)() if "torch" in sys.modules else None


def _to_torch(change: str, value: Any) -> None:
    if value is not None:
        getattr(sys.modules["torch"], change)(value)


SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the umask": (_umask, os.umask),
    "handlers of signals": (_handlers, _set_handlers),
    "the timeout of new sockets": (socket.getdefaulttimeout, socket.setdefaulttimeout),
    "the recursion limit": (sys.getrecursionlimit, sys.setrecursionlimit),
    "torch's default dtype": (
        functools.partial(_of_torch, "get_default_dtype"),
        functools.partial(_to_torch, "set_default_dtype"),
    ),
    "torch's number of threads": (
        functools.partial(_of_torch, "get_num_threads"),
        functools.partial(_to_torch, "set_num_threads"),
    ),
}
"""What the whole process has one of, and the trainer goes by: how it is looked at, and given back."""


class Guard:
    """Entered around the calls of a reward function; where several are, one in the other, the outermost one looks."""

    def __init__(self) -> None:
        self._entered = False
        self._home = -1
        self._standard: dict[int, int] = {}
        self._kept: Open | None = None
        self._warned: set[str] = set()
        self._settings: dict[str, Any] = {}

    @contextlib.contextmanager
    def around(self, name: str) -> Iterator[None]:
        """Raises RewardError, or ends a rank's process with one line, when descriptors of this process were closed."""
        if self._entered:
            yield
            return
        self._note()
        self._entered = True
        try:
            yield
        finally:  # what was entered within may never be left: the loop that it waits in may be gone
            self._entered = False
            self._check(name)

    def _note(self) -> None:
        now = connections()
        # Only what was there before the first call: a reward opens, keeps and closes connections of its own.
        self._kept = now if self._kept is None else {fd: what for fd, what in self._kept.items() if now.get(fd) == what}
        self._home = os.open(".", os.O_PATH)
        self._standard = {fd: os.dup(fd) for fd in STANDARD if fd in now}
        self._settings = {what: look() for what, (look, _) in SETTINGS.items()}

    def _check(self, name: str) -> None:
        self._give_settings_back(name)
        now = connections()
        gone = {fd: what for fd, what in (self._kept or {}).items() if now.get(fd) != what}
        try:
            self._come_home(name)
        except OSError:  # it has closed that, which is the guard's own
            gone[self._home] = "directory:"
        for fd, copy in self._standard.items():
            with contextlib.suppress(OSError):  # closed as well
                if fd in gone:
                    os.dup2(copy, fd)
                os.close(copy)
        if gone:
            which = [STANDARD.get(fd, f"{fd}, {what.partition(':')[0]}") for fd, what in sorted(gone.items())]
            more = f" and {len(which) - 4} more" if len(which) > 4 else ""
            _refuse(f"reward {name!r} closed descriptors that are not its own ({'; '.join(which[:4])}{more})")

    def _give_settings_back(self, name: str) -> None:
        for what, (look, give_back) in SETTINGS.items():
            if look() == self._settings[what] or (look is _handlers and was_interrupted()):  # Ctrl-C sets its own
                continue
            with contextlib.suppress(OSError, ValueError):  # signals, of another thread than the main one
                give_back(self._settings[what])
                self._warn(f"reward {name!r} changed {what}: it is as it was")

    def _come_home(self, name: str) -> None:
        """Raises OSError where the way home is closed."""
        home, here = os.fstat(self._home), os.open(".", os.O_PATH)
        moved = not os.path.samestat(os.fstat(here), home)
        os.close(here)
        if moved:
            where = _here()
            os.fchdir(self._home)
            self._warn(f"reward {name!r} changed the working directory to {where}: it is {_here()} again")
        os.close(self._home)

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)


def _here() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "one that was removed"


def end_a_forked_child(owner: int, name: str) -> None:
    """Ends this process if it is not ``owner``: a function that forks and returns has made a second trainer."""
    if os.getpid() != owner:
        with contextlib.suppress(OSError, ValueError):
            line = f"warning: reward {name!r} forked a process that returned from it: it was ended there\n"
            os.write(2, line.encode())
        os._exit(1)


@contextlib.contextmanager
def read_only(arrays: Iterable[np.ndarray]) -> Iterator[None]:
    """Arrays that a function is shown and that are trained on afterwards: to write into one raises ValueError."""
    writable = [array for array in arrays if array.flags.writeable]
    for array in writable:
        array.flags.writeable = False
    try:
        yield
    finally:
        for array in writable:
            array.flags.writeable = True


def connections() -> Open:
    """The standard descriptors, and those through which this process talks to others."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            what = os.readlink(f"/proc/self/fd/{name}")
            if int(name) in STANDARD or what.startswith(CONNECTIONS):
                found[int(name)] = what
    return found


def _refuse(text: str) -> NoReturn:
    """Raises RewardError; in a rank, whose connections may be among what is gone, says it and ends the process."""
    if not is_supervised():
        raise RewardError(text)
    if first_to_say("failure") is not False:
        with contextlib.suppress(OSError, ValueError):
            print(f"error: {text}", file=sys.stderr, flush=True)
    end(1)


GUARD = Guard()
"""This process's."""
