"""Where an outer step's time goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.profiler import record_function

PHASES = ("rollout", "reward", "logprobs", "train", "sync")


class Clock:
    """Seconds by phase: ``with clock("train"): ...``; started when made. ``entering`` is told of each phase."""

    def __init__(self, entering: Callable[[str], None] | None = None) -> None:
        self._entering = entering
        self._start = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self._entering is not None:
            self._entering(phase)
        start = time.perf_counter()
        with record_function(f"phase: {phase}"):
            yield
        self._seconds[phase] += time.perf_counter() - start

    def metrics(self, tokens: int) -> dict[str, float]:
        """``time/*`` in seconds, and ``tokens`` (prompt and response) over the wall time since the clock was made."""
        wall = time.perf_counter() - self._start
        return {f"time/{phase}": seconds for phase, seconds in self._seconds.items()} | {"tokens_per_s": tokens / wall}
