"""Where metrics go: the file of the run, the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from megatron_gspo.types import StepReport


class MetricSink(Protocol):
    """Takes each optimizer step's report, in order, on the reporting rank."""

    def write(self, report: StepReport) -> None:
        """Takes one line."""

    def close(self) -> None:
        """Writes what is left."""


class Fanout:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, report: StepReport) -> None:
        """Hands a line to every sink."""
        for sink in self._sinks:
            sink.write(report)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()
