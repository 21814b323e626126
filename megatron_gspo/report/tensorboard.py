"""Metrics as TensorBoard scalars, in its own format (torch is not needed).

Records are written where they are made: TensorBoard's own writer leaves that to a thread, which on a full disk says so
with a traceback.
"""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_gspo.errors import DependencyError
from megatron_gspo.report.metrics import clean

if TYPE_CHECKING:
    from megatron_gspo.types import StepReport


class TensorBoardSink:
    """One scalar a metric, under the metric's own name, at ``step`` (the initial evaluation at -1).

    ``purge_step``: the first step that is written again; TensorBoard forgets what it had from there.
    """

    def __init__(self, directory: Path, purge_step: int | None = None) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
            from tensorboard.plugins.scalar.summary_v2 import scalar_pb  # type: ignore[import-untyped]
            from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        except ImportError as error:
            raise DependencyError(
                f"TensorBoard is not installed ({error}): pip install tensorboard, or set train.tensorboard = false"
            ) from error
        self._event, self._scalar = Event, scalar_pb
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{os.getpid()}"
        self._records = RecordWriter((directory / name).open("wb"))
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if purge_step is not None:
            self._add(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, report: StepReport) -> None:
        """Writes a line as scalars."""
        event = self._event(wall_time=time.time(), step=report.step)
        for name, value in clean(report.metrics).items():
            event.summary.MergeFrom(self._scalar(name, value))
        self._add(event)

    def close(self) -> None:
        """Closes the event file."""
        self._records.close()

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()
