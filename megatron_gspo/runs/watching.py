"""The watchdog of a run: where it beats, what it says, and how it ends a rank that waits for one that is gone."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import RankMissingError
from megatron_gspo.parallel.watchdog import Watchdog
from megatron_gspo.runs.recording import Agreed
from megatron_gspo.runs.saying import say_once
from megatron_gspo.supervise import FAILED, STORE, end

RECORDING_S = 10.0
"""That a run which cannot go on may take to record that it has failed."""
FOLDER = ".ranks"


class Watch:
    """The watchdog of this rank, from when there is a world: ranks may be missing before there is a run directory."""

    def __init__(self, config: RunConfig) -> None:
        self._recorder: Agreed | None = None
        self._place = place_of_beats(config)
        self._dog = Watchdog(
            directory=self._place,
            rank=dist.get_rank(),
            world=dist.get_world_size(),
            timeout_s=config.train.collective_timeout_s,
            give_up=lambda line: say_once(f"error: {line}"),
            end=self._end,
            warn=_warn,
            phase=lambda: "reading what the run needs" if self._recorder is None else self._recorder.at,
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Within it this rank watches and is watched."""
        try:
            with self._dog:
                yield
        finally:
            if dist.get_rank() == 0:
                shutil.rmtree(self._place, ignore_errors=True)

    @contextlib.contextmanager
    def recording(self, recorder: Agreed) -> Iterator[None]:
        """Within it phases are the recorder's, which is told what a missing rank has caused."""
        self._recorder = recorder
        with self._dog.blamed():
            yield

    def _end(self, line: str) -> None:
        """Ends this process, whose main thread waits and cannot be woken, with the failure on record."""

        def record() -> None:
            with contextlib.suppress(Exception):
                if self._recorder is not None:
                    self._recorder.__exit__(RankMissingError, RankMissingError(line), None)

        recording = threading.Thread(target=record, daemon=True)
        recording.start()
        recording.join(RECORDING_S)
        end(FAILED)


def place_of_beats(config: RunConfig) -> Path:
    """Where ranks find each other's beats: their private directory, or beside the run's where they are torchrun's, on
    several machines perhaps. (Absolute: a reward may chdir.)"""
    if STORE in os.environ:
        return Path(os.environ[STORE]).with_name(FOLDER)
    run_dir = Path(config.train.run_dir).absolute()
    return run_dir.with_name(run_dir.name + FOLDER)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)
