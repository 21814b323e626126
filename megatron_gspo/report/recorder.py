"""What a run writes and prints, as one: the run directory, the terminal, TensorBoard, Weights & Biases, the page."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from megatron_gspo.config import RunConfig
from megatron_gspo.errors import RunStopped
from megatron_gspo.report.console import ConsoleSink
from megatron_gspo.report.ending import ending
from megatron_gspo.report.html import write_report
from megatron_gspo.report.manifest import describe, with_start
from megatron_gspo.report.metrics import INITIAL
from megatron_gspo.report.prometheus import PrometheusSink
from megatron_gspo.report.rundir import RunDirectory, initial_evaluation
from megatron_gspo.report.sink import Fanout, MetricSink
from megatron_gspo.report.tensorboard import TensorBoardSink
from megatron_gspo.report.wandb import WandbSink
from megatron_gspo.storage import writing

if TYPE_CHECKING:
    from megatron_gspo.types import RolloutRecord, StepReport


CONTINUE = "train.resume = true continues from the newest checkpoint"


class Continued(Protocol):
    """A checkpoint that a run goes on from."""

    @property
    def directory(self) -> Path:
        """The checkpoint."""

    @property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """Setting -> (then, now)."""

    @property
    def outer_steps(self) -> int:
        """That it has done."""


class RunRecorder:
    """The ``Recorder`` of the one rank that reports.

    ``page``: writes ``report.html`` at the end. Raises ConfigError when the run directory exists and is not continued,
    or when another process writes it; WriteError, here and later, when the disk does not take what is written.
    """

    def __init__(
        self, config: RunConfig, world_size: int, continued: Continued | None = None, *, page: bool = True
    ) -> None:
        self._config, self._world_size, self._page = config, world_size, page
        purge_step = None
        if continued is None:
            self._directory = RunDirectory.create(config)
            self._lock = self._directory.lock()
        else:
            self._directory = RunDirectory.open(config.train.run_dir)
            self._lock = self._directory.lock()
            self._directory.cut_back(config, continued.outer_steps)
            purge_step = max([line["step"] for line in self._directory.metrics()], default=INITIAL) + 1
        self._manifest = with_start(describe(config, world_size), self._directory.manifest(), _as_record(continued))
        self._console = ConsoleSink(config, world_size)
        with self._writing():
            self._directory.write_manifest(self._manifest)
            sinks: list[MetricSink] = [self._directory.metrics_writer(), self._console]
            if config.train.tensorboard:
                sinks.append(TensorBoardSink(self._directory.tensorboard, purge_step))
            if config.train.wandb:
                sinks.append(WandbSink(self._directory, config))
            if config.train.metrics_address:
                sinks.append(PrometheusSink(self._directory, config, world_size))
        self._sink = Fanout(sinks)

    def engine(self, description: Mapping[str, Any]) -> None:
        """What the rollout servers said of themselves, for the manifest."""
        own = {name: self._manifest[name] for name in ("started", "starts")}
        with self._writing():
            self._directory.write_manifest(describe(self._config, self._world_size, description) | own)

    def phase(self, text: str) -> None:
        """What happens now, on the terminal."""
        self._console.phase(text)

    def note(self, text: str) -> None:
        """A line on the terminal."""
        self._console.note(text)

    def initial(self, metrics: Mapping[str, float]) -> None:
        """The evaluation before any training."""
        with self._writing():
            self._sink.write(initial_evaluation(metrics))

    def steps(self, reports: Sequence[StepReport]) -> None:
        """Optimizer steps, in order."""
        with self._writing():
            for report in reports:
                self._sink.write(report)

    def rollouts(self, outer_step: int, records: Sequence[RolloutRecord]) -> None:
        """Responses to read."""
        with self._writing():
            self._directory.write_rollouts(outer_step, records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended = "finished" if error is None else "stopped" if isinstance(error, RunStopped) else "failed"
        what = " ".join(str(error).split()) if ended == "failed" else ""
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else what
        page = f"`megatron-gspo report {self._directory.path}` draws it"
        for end, writes in (
            (self._sink.close, self._writing()),
            (lambda: self._directory.finish(ended, what), self._writing()),
            (self._draw, writing(self._directory.report_file, "the run is done, but its page", page)),
            (self._lock.close, contextlib.nullcontext()),
        ):
            with writes if error is None else contextlib.suppress(Exception):  # what failed first is said
                end()
        if error is None:
            self._console.ending(ending(self._directory))

    def _draw(self) -> None:
        if self._page:
            write_report([self._directory.path], self._directory.report_file)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        """What the disk does not take, or a directory that is gone, is said with what is left to do."""
        return writing(self._directory.path, "what the run records", CONTINUE)


def _as_record(continued: Continued | None) -> dict[str, Any] | None:
    if continued is None:
        return None
    changes = {name: list(pair) for name, pair in continued.changes.items()}
    return {"outer_step": continued.outer_steps, "checkpoint": continued.directory.name, "changes": changes}
