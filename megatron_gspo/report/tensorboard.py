"""Metrics as TensorBoard scalars, through TensorBoard's own writer (torch is not needed)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_gspo.errors import DependencyError
from megatron_gspo.report.metrics import clean

if TYPE_CHECKING:
    from megatron_gspo.types import StepReport


class TensorBoardSink:
    """One scalar a metric, under the metric's own name, at ``step`` (the initial evaluation at -1)."""

    def __init__(self, directory: Path) -> None:
        try:
            from tensorboard.summary import Writer  # type: ignore[import-untyped]
        except ImportError as error:
            raise DependencyError(
                f"TensorBoard is not installed ({error}): pip install tensorboard, or set train.tensorboard = false"
            ) from error
        self._writer = Writer(str(directory))

    def write(self, report: StepReport) -> None:
        for name, value in clean(report.metrics).items():
            self._writer.add_scalar(name, value, report.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
