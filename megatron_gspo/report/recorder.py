"""What a run writes and prints, as one: the run directory, the terminal, TensorBoard, Weights & Biases, the page."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from megatron_gspo.config import RunConfig
from megatron_gspo.report.console import ConsoleSink
from megatron_gspo.report.html import write_report
from megatron_gspo.report.manifest import describe
from megatron_gspo.report.rundir import RunDirectory, initial_evaluation
from megatron_gspo.report.sink import Fanout, MetricSink
from megatron_gspo.report.tensorboard import TensorBoardSink
from megatron_gspo.report.wandb import WandbSink

if TYPE_CHECKING:
    from megatron_gspo.types import RolloutRecord, StepReport


class RunRecorder:
    """The ``Recorder`` of the one rank that reports. Raises ConfigError when the run directory exists."""

    def __init__(self, config: RunConfig, world_size: int) -> None:
        self._config, self._world_size = config, world_size
        self._directory = RunDirectory.create(config)
        self._directory.write_manifest(describe(config, world_size))
        self._console = ConsoleSink(config, world_size)
        sinks: list[MetricSink] = [self._directory.metrics_writer(), self._console]
        if config.train.tensorboard:
            sinks.append(TensorBoardSink(self._directory.tensorboard))
        if config.train.wandb:
            sinks.append(WandbSink(self._directory, config))
        self._sink = Fanout(sinks)

    def engine(self, description: Mapping[str, Any]) -> None:
        """What the rollout servers said of themselves, for the manifest."""
        self._directory.write_manifest(describe(self._config, self._world_size, description))

    def phase(self, text: str) -> None:
        """What happens now, on the terminal."""
        self._console.phase(text)

    def note(self, text: str) -> None:
        """A line on the terminal."""
        self._console.note(text)

    def initial(self, metrics: Mapping[str, float]) -> None:
        """The evaluation before any training."""
        self._sink.write(initial_evaluation(metrics))

    def steps(self, reports: Sequence[StepReport]) -> None:
        """Optimizer steps, in order."""
        for report in reports:
            self._sink.write(report)

    def rollouts(self, outer_step: int, records: Sequence[RolloutRecord]) -> None:
        """Responses to read."""
        self._directory.write_rollouts(outer_step, records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sink.close()
        self._directory.finish("finished" if error is None else "failed")
        with contextlib.nullcontext() if error is None else contextlib.suppress(Exception):
            write_report([self._directory.path], self._directory.report_file)
