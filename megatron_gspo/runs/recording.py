"""Where a run's numbers go, as training sees it. ``report.recorder.RunRecorder`` is the real one, handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.megatron.groups import Groups
from megatron_gspo.parallel.exchange import agree, together
from megatron_gspo.report.ranks import clear_signs
from megatron_gspo.runs.heartbeat import Heartbeat
from megatron_gspo.runs.resume import Resumption
from megatron_gspo.types import RolloutRecord, StepReport


class Recorder(Protocol):
    """Entered for the length of a run; leaving it with an exception records a failure."""

    def engine(self, description: Mapping[str, Any]) -> None:
        """What the engine says of itself."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def note(self, text: str) -> None:
        """A line for whoever watches."""

    def initial(self, metrics: Mapping[str, float]) -> None:
        """Metrics before the first step."""

    def steps(self, reports: Sequence[StepReport]) -> None:
        """Reports of optimizer steps."""

    def rollouts(self, outer_step: int, records: Sequence[RolloutRecord]) -> None:
        """Responses kept for reading."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


MakeRecorder = Callable[[RunConfig, int, Resumption | None], Recorder]
"""(configuration, world size, what the run continues from) -> the recorder of the rank that reports."""


class Silent:
    """The recorder of every other rank."""

    def engine(self, description: Mapping[str, Any]) -> None: ...

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def initial(self, metrics: Mapping[str, float]) -> None: ...

    def steps(self, reports: Sequence[StepReport]) -> None: ...

    def rollouts(self, outer_step: int, records: Sequence[RolloutRecord]) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class Agreed:
    """A recorder whose failure to write is raised on every rank, so that none waits for the first in a collective.
    Every rank's ``Heartbeat`` hears of it all."""

    def __init__(self, recorder: Recorder, world: dist.ProcessGroup, heartbeat: Heartbeat) -> None:
        self._recorder, self._world, self._heartbeat = recorder, world, heartbeat
        self.enter = heartbeat.enter
        self.at = "starting"
        """The last phase, on every rank that was told."""

    def phase(self, text: str) -> None:
        """As ``Recorder.phase``."""
        self.at = text
        self._heartbeat.phase(text)
        self._recorder.phase(text)

    def note(self, text: str) -> None:
        """As ``Recorder.note``."""
        self._heartbeat.note(text)
        self._recorder.note(text)

    def engine(self, description: Mapping[str, Any]) -> None:
        """As ``Recorder.engine``."""
        together(lambda: self._recorder.engine(description), self._world)

    def initial(self, metrics: Mapping[str, float]) -> None:
        """As ``Recorder.initial``; a failure reaches all ranks."""
        together(lambda: self._recorder.initial(metrics), self._world)

    def steps(self, reports: Sequence[StepReport]) -> None:
        """As ``Recorder.steps``; a failure reaches all ranks."""
        together(lambda: self._recorder.steps(reports), self._world)
        if reports:
            self._heartbeat.done(reports[-1].step)

    def rollouts(self, outer_step: int, records: Sequence[RolloutRecord]) -> None:
        """As ``Recorder.rollouts``; a failure reaches all ranks."""
        together(lambda: self._recorder.rollouts(outer_step, records), self._world)

    def __enter__(self) -> Self:
        self._heartbeat.start()
        self._recorder.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._recorder.__exit__(kind, error, traceback)
        except BaseException as unwritten:
            self._heartbeat.end(unwritten)
            raise
        self._heartbeat.end(error)


def open_recorder(make: MakeRecorder, config: RunConfig, groups: Groups, resumption: Resumption | None) -> Agreed:
    """The first rank's recorder, and silence elsewhere. Collective, as is what writes: failures reach every rank."""
    recorder: Recorder = Silent()
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            recorder = make(config, dist.get_world_size(), resumption)
            clear_signs(Path(config.train.run_dir))
        except Exception as caught:
            error = caught
    agree(error, groups.world)
    return Agreed(recorder, groups.world, Heartbeat(Path(config.train.run_dir), dist.get_rank()))
