"""A rank's signs of life and its log, written by a thread of its own: training neither waits for it nor fails on it."""

from __future__ import annotations

import contextlib
import platform
import queue
import threading
import time
from pathlib import Path

from megatron_gspo.errors import RunStopped
from megatron_gspo.report.ranks import ENDED, EVERY_S, FAILED, event, log_file, sign_of, write_sign

LAST_WORDS_S = 5.0
"""Seconds that the end of a run waits for its last lines: a file system may hang."""


class Heartbeat:
    """Of one rank, from ``start`` to ``end``. What the disk does not take is lost without a word: a run does not fail
    for want of its log."""

    def __init__(self, run: Path, rank: int, every_s: float = EVERY_S) -> None:
        self._run, self._rank, self._every_s = run, rank, every_s
        self._host = platform.node()
        self._phase, self._since = "starting", time.time()
        self._step: int | None = None
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=f"heartbeat of rank {rank}", daemon=True)

    def phase(self, text: str) -> None:
        """What this rank does from now on; a line of its log."""
        self._enter(text)
        self.note(text)

    def enter(self, phase: str) -> None:
        """A part of an outer step: no line of the log, which would have six a step."""
        self._enter(phase)
        self._lines.put("")

    def note(self, text: str) -> None:
        """A line of the log."""
        self._lines.put(event(self._rank, text, time.time()))

    def done(self, step: int) -> None:
        """An optimizer step is done."""
        self._step = step

    def start(self) -> None:
        """The rank is there."""
        self.note(f"started on {self._host}")
        self._thread.start()

    def end(self, error: BaseException | None = None) -> None:
        """The rank has done what it was to do, or has failed with ``error``; these are its last words."""
        failed = error is not None and not isinstance(error, RunStopped)
        self._enter(FAILED if failed else ENDED)
        said = "finished" if error is None else f"{type(error).__name__}: {error}"
        self.note(f"failed: {said}" if failed else said)
        self._lines.put(None)
        self._thread.join(LAST_WORDS_S)

    def _enter(self, phase: str) -> None:
        self._phase, self._since = phase, time.time()

    def _write(self) -> None:
        """Until None comes: what came, and after each of it, or after a while without, the sign."""
        over = False
        while not over:
            lines, over = self._wait()
            with contextlib.suppress(OSError):
                self._append("".join(lines))
            with contextlib.suppress(OSError):
                write_sign(self._run, sign_of(self._rank, self._host, self._phase, self._step, self._since))

    def _wait(self) -> tuple[list[str], bool]:
        """(lines that have come, whether that was all)."""
        lines: list[str] = []
        with contextlib.suppress(queue.Empty):
            line = self._lines.get(timeout=self._every_s)
            while line is not None:
                lines.append(line)
                line = self._lines.get_nowait()
            return lines, True
        return lines, False

    def _append(self, text: str) -> None:
        if text:
            path = log_file(self._run, self._rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text)
