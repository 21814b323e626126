"""SIGTERM as a request: finish the outer step, save, and end (a scheduler that preempts a job sends it first)."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_gspo.parallel.exchange import gather_objects


class StopRequest:
    """Within it SIGTERM ends nothing and is remembered. Python handles a signal between two of its instructions, so a
    rank that waits in a collective does when the collective is over."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set a handler
            self._before = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def asked(self, world: dist.ProcessGroup) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return any(gather_objects(self._asked, world))

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
