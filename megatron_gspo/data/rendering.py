"""Chat templates rendered in a process that can be stopped.

A template comes with a model, and is a program: one line of it can loop for hours or fill the memory, in a sandbox,
too. So a process of its own runs it, with a limit of processor time and of memory that the kernel keeps. It is started
when it is first needed, takes any number of prompts of any template, and ends with this one, however that ends: its
input is a pipe that closes.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gspo.data.template_worker import LENGTH, LONG, MEMORY, TEXT
from megatron_gspo.errors import DataError

LIMIT_S = 5.0
"""Processor time of one prompt; real templates take less than a millisecond."""
PATIENCE = 12
"""Times ``LIMIT_S`` of wall time: a busy machine is no reason to refuse a template."""
MEMORY_BYTES = 2**29
"""Address space of the process."""
MOST_CHARACTERS = 2**24
"""Of a rendered prompt."""


class StoppedError(DataError):
    """A template that went beyond its bounds; it is not asked again."""


class Renderer:
    """One process that renders; may be called from any thread."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, head: bytes, body: bytes) -> str:
        """The worker's answer (``template_worker``). Raises DataError with the template's own refusal, StoppedError
        for one that went beyond its bounds."""
        with self._lock:
            process = self._process = self._process or self._start()
            reply = _exchange(process, head, body, time.monotonic() + PATIENCE * self._limit_s)
            if reply is None:
                raise StoppedError(self._end(process))
        kind, text = reply
        if kind == TEXT:
            return text
        if kind == MEMORY:
            raise StoppedError(f"needs more than {MEMORY_BYTES // 2**20} MiB of memory for one prompt")
        if kind == LONG:
            raise StoppedError(f"writes {text} characters for one prompt, more than {MOST_CHARACTERS}")
        raise DataError(text)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._process is not None:
                self._end(self._process)

    def _start(self) -> subprocess.Popen[bytes]:
        worker = Path(__file__).with_name("template_worker.py")
        limits = map(str, (self._limit_s, MEMORY_BYTES, MOST_CHARACTERS))
        command = [sys.executable, "-P", str(worker), *limits]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert process.stdin is not None and process.stdout is not None
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        return process

    def _end(self, process: subprocess.Popen[bytes]) -> str:
        """Says why it ended, if it had."""
        ended = process.poll() is not None or _wait_briefly(process)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._process = None
        if not ended or process.returncode in (-signal.SIGPROF, -signal.SIGKILL):
            return f"takes more than {self._limit_s:g} s of processor time for one prompt"
        return f"ended the process in which it ran (status {process.returncode})"


def bind(source: str, variables: Mapping[str, Any]) -> bytes:
    """A template with what it gets beside the messages, as the worker keeps it."""
    return pickle.dumps((source, dict(variables)))


def render(head: bytes, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool) -> str:
    """One prompt's text. Raises DataError as ``Renderer.ask`` does."""
    return shared_renderer().ask(head, pickle.dumps((list(messages), generation_prompt)))


def names_read(head: bytes) -> set[str]:
    """Names that a template reads and does not set. Raises DataError as ``Renderer.ask`` does."""
    return set(json.loads(shared_renderer().ask(head, b"")))


def _wait_briefly(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended: a pipe closes a moment before its process is gone."""
    try:
        process.wait(1.0)
    except subprocess.TimeoutExpired:
        return False
    return True


def _exchange(process: subprocess.Popen[bytes], head: bytes, body: bytes, deadline: float) -> tuple[bytes, str] | None:
    """Sends a request and returns the answer; None when the process has ended, or the time is up."""
    assert process.stdin is not None and process.stdout is not None
    request = memoryview(b"".join((LENGTH.pack(len(head)), head, LENGTH.pack(len(body)), body)))
    waiting = select.poll()  # select() cannot watch descriptors above 1023, and a trainer has those
    waiting.register(process.stdin, select.POLLOUT)
    while request:
        try:
            request = request[os.write(process.stdin.fileno(), request) :]
        except BlockingIOError:
            if not waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
                return None
        except OSError:
            return None
    if (start := _read(process, 1 + LENGTH.size, deadline)) is None:
        return None
    (length,) = LENGTH.unpack(start[1:])
    text = _read(process, length, deadline)
    return None if text is None else (start[:1], text.decode("utf-8", "surrogatepass"))


def _read(process: subprocess.Popen[bytes], length: int, deadline: float) -> bytes | None:
    """So many bytes; None when the process has ended, or the time is up."""
    assert process.stdout is not None
    waiting = select.poll()
    waiting.register(process.stdout, select.POLLIN)
    found = bytearray()
    while len(found) < length:
        if not waiting.poll(1000 * max(0.0, deadline - time.monotonic())):
            return None
        piece = os.read(process.stdout.fileno(), min(length - len(found), 2**20))
        if not piece:
            return None
        found += piece
    return bytes(found)


_shared: dict[int, Renderer] = {}
_shared_lock = threading.Lock()


def shared_renderer() -> Renderer:
    """This process's renderer; a forked child gets its own. It is closed at exit."""
    with _shared_lock:
        if os.getpid() not in _shared:
            _shared.clear()
            _shared[os.getpid()] = Renderer()
            atexit.register(_shared[os.getpid()].close)
        return _shared[os.getpid()]
