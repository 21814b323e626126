"""``train.on_checkpoint``: a command for each finished checkpoint, one after the other, while training goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from megatron_gspo.config import TrainConfig
from megatron_gspo.hooks import run_hook
from megatron_gspo.storage import replace_text

DONE = "on_checkpoint"
"""Beside the checkpoints: the name of the last one for which the command has succeeded."""


class CheckpointHook:
    """On the rank that gives checkpoints their names. Without a command it does nothing.

    A checkpoint that goes by the rule before its turn is left out, with a warning: checkpoints that wait for a slow
    command would fill the disk. The one for which the command runs stays until it has ended.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._waiting: deque[Path] = deque()
        self._running: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, directory: Path) -> None:
        """It is finished: its turn comes."""
        if not self._train.on_checkpoint:
            return
        with self._changed:
            self._waiting.append(directory)
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint hook", daemon=True)
            self._thread.start()

    def add_unless_done(self, directory: Path) -> None:
        """A run goes on from it: the one before may have been killed before the command was done."""
        with contextlib.suppress(OSError):
            if (directory.parent / DONE).read_text(encoding="utf-8").strip() == directory.name:
                return
        self.add(directory)

    @contextlib.contextmanager
    def pruning(self) -> Iterator[frozenset[Path]]:
        """Within it no command begins; the checkpoints that must stay."""
        with self._changed:
            yield frozenset() if self._running is None else frozenset({self._running})

    def finish(self) -> None:
        """Waits until all are done, for ``train.hook_timeout_s`` at most."""
        deadline = time.monotonic() + self._train.hook_timeout_s
        with self._changed:
            while (self._waiting or self._running) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._running:
                line = f"train.on_checkpoint still runs for {self._running.name}: the run has ended and does not wait"
                print(f"warning: {line} for it any longer", file=sys.stderr, flush=True)
            for directory in self._waiting:
                _warn(f"{directory.name}: the run has ended and does not wait for it any longer")
            self._waiting.clear()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                directory = self._waiting.popleft()
                if not directory.is_dir():
                    _warn(f"{directory.name}: train.keep_last has removed it before its turn")
                    continue
                self._running = directory
            try:
                self._run(directory)
            finally:
                with self._changed:
                    self._running = None
                    self._changed.notify_all()

    def _run(self, directory: Path) -> None:
        train = self._train
        words, run_dir = {"CHECKPOINT": str(directory)}, str(directory.parents[1])
        succeeded = run_hook(
            "train.on_checkpoint", train.on_checkpoint, [str(directory)], words, train.hook_timeout_s, run_dir
        )
        if succeeded:
            with contextlib.suppress(OSError):
                replace_text(directory.parent / DONE, directory.name + "\n")


def _warn(line: str) -> None:
    print(f"warning: train.on_checkpoint was not run for {line}", file=sys.stderr, flush=True)
