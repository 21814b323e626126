"""Metrics as TensorBoard scalars, through TensorBoard's own writer (torch is not needed)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

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
            from tensorboard.summary import Writer  # type: ignore[import-untyped]
        except ImportError as error:
            raise DependencyError(
                f"TensorBoard is not installed ({error}): pip install tensorboard, or set train.tensorboard = false"
            ) from error
        if purge_step is not None:
            _purge(directory, purge_step)
        self._writer = Writer(str(directory))

    def write(self, report: StepReport) -> None:
        for name, value in clean(report.metrics).items():
            self._writer.add_scalar(name, value, report.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _purge(directory: Path, step: int) -> None:
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # type: ignore[import-untyped]
    from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

    writer = EventFileWriter(str(directory))
    writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
    writer.close()
