"""One run of a program: started, watched, ended with all that it started. Standard library alone."""

from __future__ import annotations

import contextlib
import json
import os
import resource  # noqa: F401  # os.wait4 imports it, and may be called where Python's files cannot be read any more
import select
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_gspo.sandbox.interface import Limits, Outcome, Verdict
from megatron_gspo.sandbox.languages import Language
from megatron_gspo.sandbox.watch import ChildrenWatch, NamespaceWatch, Watch, children

LOOK_S = 0.01
"""Seconds between looks at what a program takes; more where a look itself takes long."""
SHARE = 0.1
"""Of one processor's time that looking may take."""
CHUNK = 65536
IGNORED = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT)
"""Signals that Python ignores or catches, and that a program begins with as they are."""


class ClientGoneError(Exception):
    """Whoever asked for the run is not there any more."""


@dataclass(frozen=True)
class Start:
    """What is started."""

    command: Sequence[str]
    environment: Mapping[str, str]
    stdin: int
    status: int | None
    """The end from which bubblewrap's words about the program are read; None without namespaces."""


class Run:
    """One run, from its start to the end of the last process."""

    def __init__(self, start: Start, limits: Limits, control: socket.socket) -> None:
        """``control``: the client's connection, on which nothing comes before the run has ended, but its end."""
        self._limits, self._control, self._status = limits, control, start.status
        self._output: dict[int, bytearray] = {}
        self._said = b""
        self._stopped: Verdict | None = None
        self._watch: Watch | None = None if start.status is not None else ChildrenWatch()
        self._cpu_s = 0.0
        self._crowded = False
        self._exit: int | None = None
        self._start(start)

    def _start(self, start: Start) -> None:
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        self._out, self._err = out, err
        for fd in (out, err):
            os.set_blocking(fd, False)
            self._output[fd] = bytearray()
        moves = [(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate((start.stdin, out_end, err_end))]
        self._began = time.monotonic()
        try:
            self._pid = os.posix_spawn(
                start.command[0],
                list(start.command),
                dict(start.environment),
                file_actions=moves,
                setsigdef=IGNORED,
            )
        finally:
            os.close(out_end)
            os.close(err_end)
        self._handle = os.pidfd_open(self._pid)

    def outcome(self, language: Language) -> Outcome:
        """Waits for the end, and says how it was. Raises ClientGoneError; nothing is left then either."""
        try:
            self._wait()
        finally:
            self.wall_s = time.monotonic() - self._began
            self._end()
        return self._judge(language)

    def _wait(self) -> None:
        poller = select.poll()
        for fd in (self._out, self._err, self._handle, self._control.fileno()):
            poller.register(fd, select.POLLIN)
        deadline, look, ended = self._began + self._limits.wall_s, self._began + 2 * LOOK_S, False
        while not ended and self._stopped is None:
            now = time.monotonic()
            if now >= deadline:
                self._stopped = Verdict.TIME
            elif now >= look:
                self._look()
                after = time.monotonic()
                look = after + max(LOOK_S, (after - now) / SHARE)
            for fd, _ in poller.poll(max(0.0, 1000 * (min(deadline, look) - now))):
                if fd == self._control.fileno():
                    raise ClientGoneError
                if fd == self._handle:
                    ended = True
                elif not self._read(fd):
                    poller.unregister(fd)

    def _read(self, fd: int) -> bool:
        """Takes what a pipe holds; False at its end."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(fd, CHUNK)
            room = self._limits.output_bytes - len(self._output[fd])
            self._output[fd] += data[:room]
            if len(data) > room:
                self._stopped = self._stopped or Verdict.OUTPUT
            return bool(data)
        return True

    def _look(self) -> None:
        """Ends the run where all of its processes together take too much."""
        if self._watch is None and (first := self._first()) is not None:
            with contextlib.suppress(OSError):  # not all is mounted yet
                self._watch = NamespaceWatch(first)
        if self._watch is None:
            return
        with contextlib.suppress(OSError):  # the namespace is going away
            usage = self._watch.usage()
            self._cpu_s = max(self._cpu_s, usage.cpu_s)
            if self._cpu_s >= self._limits.cpu_s:
                self._stopped = Verdict.TIME
            elif usage.memory_bytes > self._limits.memory_bytes and self._watch.memory() > self._limits.memory_bytes:
                self._stopped = Verdict.MEMORY
            elif usage.threads > 2 * self._limits.processes + 8:  # the kernel did not count
                self._crowded, self._stopped = True, Verdict.CRASHED

    def _first(self) -> int | None:
        """Process id of the namespace's first process, once bubblewrap has said it."""
        self._hear()
        for line in self._said.split(b"\n")[:-1]:
            if (pid := json.loads(line).get("child-pid")) is not None:
                return int(pid)
        return None

    def _hear(self) -> None:
        if self._status is not None:
            with contextlib.suppress(BlockingIOError):
                while words := os.read(self._status, CHUNK):
                    self._said += words

    def _end(self) -> None:
        """Ends every process of the run, waits until they are gone, and takes what they had still written.

        The first process of a namespace takes all others with it; it comes to this process when bubblewrap's other
        half, which watches it, is killed, and so does what is left of a program without namespaces.
        """
        if self._watch is not None:
            self._watch.close()
        os.close(self._handle)
        cpu_s, waiting = 0.0, [self._pid]
        while waiting:
            for pid in waiting:
                with contextlib.suppress(ProcessLookupError):
                    if pid != self._pid or self._stopped is not None or not _has_ended(pid):
                        os.kill(pid, signal.SIGKILL)
            for pid in waiting:
                with contextlib.suppress(ChildProcessError):
                    _, status, used = os.wait4(pid, 0)
                    cpu_s += used.ru_utime + used.ru_stime
                    if pid == self._pid:
                        self._exit = os.waitstatus_to_exitcode(status)
            waiting = children(os.getpid())
        self._cpu_s = max(self._cpu_s, cpu_s)
        self._hear()
        for fd in (self._out, self._err):
            os.set_blocking(fd, True)  # nobody is left who could write
            while self._stopped is not Verdict.OUTPUT and self._read(fd):
                pass
            os.close(fd)

    def _judge(self, language: Language) -> Outcome:
        status = self._exit_status()
        stderr = bytes(self._output[self._err])
        if self._stopped is not None:
            verdict, status = self._stopped, None
        elif status is None:
            verdict = Verdict.FAILED
        elif status == 0:
            verdict = Verdict.OK
        elif self._cpu_s >= self._limits.cpu_s:
            verdict, status = Verdict.TIME, None
        elif language.out_of_memory in stderr:
            verdict = Verdict.MEMORY
        else:
            verdict = Verdict.CRASHED
        if self._crowded:
            stderr += f"\n(ended: more than {self._limits.processes} processes and threads)".encode()
        return Outcome(verdict, status, bytes(self._output[self._out]), stderr, self.wall_s, self._cpu_s)

    def _exit_status(self) -> int | None:
        """How the program ended; None where it was never started."""
        if self._status is None:
            return None if self._exit is None else (128 - self._exit if self._exit < 0 else self._exit)
        for line in self._said.split(b"\n")[:-1]:
            if (status := json.loads(line).get("exit-code")) is not None:
                return int(status)
        return None


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
