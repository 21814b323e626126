"""Where a run's numbers go, as training sees it. ``report.recorder.RunRecorder`` is the real one, handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import torch.distributed as dist

from megatron_gspo.config import RunConfig
from megatron_gspo.parallel.exchange import agree
from megatron_gspo.policy.groups import Groups
from megatron_gspo.train.resume import Resumption
from megatron_gspo.types import RolloutRecord, StepReport


class Recorder(Protocol):
    """Entered for the length of a run; leaving it with an exception records a failure."""

    def engine(self, description: Mapping[str, Any]) -> None: ...

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def initial(self, metrics: Mapping[str, float]) -> None: ...

    def steps(self, reports: Sequence[StepReport]) -> None: ...

    def rollouts(self, outer_step: int, records: Sequence[RolloutRecord]) -> None: ...

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


def open_recorder(make: MakeRecorder, config: RunConfig, groups: Groups, resumption: Resumption | None) -> Recorder:
    """The first rank's recorder, and silence elsewhere. Collective: a failure to make it reaches every rank."""
    recorder: Recorder = Silent()
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            recorder = make(config, dist.get_world_size(), resumption)
        except Exception as caught:
            error = caught
    agree(error, groups.world)
    return recorder
