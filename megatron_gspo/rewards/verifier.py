"""math-verify in processes of its own, which can be stopped.

A thread cannot be stopped, and sympy may work on a line of text for ever. Each process here is started when it is first
needed, kept for the next expression, and replaced when it was stopped. It ends with this one, however that ends: its
input is a pipe that closes, and its processor time is limited by the kernel. Nothing is forked, so no state of torch,
CUDA or a thread is shared.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

LIMIT_S = 3.0
"""Processor time of one expression; math-verify takes milliseconds for those that come here."""
PATIENCE = 7
"""Times ``LIMIT_S`` of wall time: a busy machine is no reason to judge otherwise."""
START_S = 60.0
"""Wall time until a process has imported sympy."""
PROCESSES = 2
"""At most, in each process that grades."""
MEMORY_BYTES = 4 * 2**30
"""Address space of each."""


class StoppedError(Exception):
    """An expression took longer than its limit, and the process with it is gone."""


class Verifier:
    """A few processes that compare expressions; may be called from any thread."""

    def __init__(self, limit_s: float = LIMIT_S, processes: int = PROCESSES) -> None:
        self.limit_s = limit_s
        self._free = threading.BoundedSemaphore(processes)
        self._idle: list[subprocess.Popen[bytes]] = []
        self._all: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()

    def equal(self, expected: str, found: str) -> bool:
        """Whether math-verify finds two pieces of LaTeX equal. Waits for a process.

        Raises StoppedError when it took more than ``limit_s`` seconds of processor time, or ``PATIENCE`` times that
        of wall time; RuntimeError when math-verify cannot be imported.
        """
        request = json.dumps([expected, found]).encode() + b"\n"
        with self._free:
            with self._lock:
                process = self._idle.pop() if self._idle else None
            process = process or self._start()
            answer = _ask(process, request, PATIENCE * self.limit_s)
            if not answer:
                self._end(process)
                raise StoppedError
            with self._lock:
                self._idle.append(process)
        return bool(json.loads(answer))

    def close(self) -> None:
        """Ends every process."""
        with self._lock:
            processes = list(self._all)
            self._idle.clear()
        for process in processes:
            self._end(process)

    def _start(self) -> subprocess.Popen[bytes]:
        worker = Path(__file__).with_name("verify_worker.py")
        command = [sys.executable, "-P", str(worker), str(self.limit_s), str(MEMORY_BYTES)]  # -P: numbers.py is ours
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
        )
        with self._lock:
            self._all.add(process)
        ready = _ask(process, b"", START_S)
        if ready is None:
            self._end(process)
            raise StoppedError
        if not ready:
            assert process.stderr is not None
            lines = process.stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            process.wait()
            self._end(process)
            raise RuntimeError(f"math-verify's process ended with status {process.returncode}: {lines[-1]}")
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        with self._lock:
            self._all.discard(process)


def _ask(process: subprocess.Popen[bytes], request: bytes, patience_s: float) -> bytes | None:
    """Sends a line and returns the one that comes back; b"" when the process has ended, None when the time is up."""
    assert process.stdin is not None and process.stdout is not None
    deadline = time.monotonic() + patience_s
    try:
        process.stdin.write(request)
    except OSError:
        return b""
    output = select.poll()  # select() cannot watch descriptors above 1023, and a trainer has those
    output.register(process.stdout, select.POLLIN)
    answer = b""
    while not answer.endswith(b"\n"):
        left = max(0.0, deadline - time.monotonic())
        if not output.poll(1000 * left):
            return None
        piece = os.read(process.stdout.fileno(), 4096)
        if not piece:
            return b""
        answer += piece
    return answer


_shared: dict[int, Verifier] = {}
_shared_lock = threading.Lock()


def shared_verifier() -> Verifier:
    """This process's verifier; a forked child gets its own. It is closed at exit."""
    with _shared_lock:
        if os.getpid() not in _shared:
            _shared.clear()
            _shared[os.getpid()] = Verifier()
            atexit.register(_shared[os.getpid()].close)
        return _shared[os.getpid()]
