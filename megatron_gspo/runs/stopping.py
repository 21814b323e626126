"""SIGTERM and SIGUSR1 as a request: finish the outer step, save, and end."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch.distributed as dist

from megatron_gspo.parallel.exchange import gather_objects
from megatron_gspo.supervise import STOPS, asked_early


class StopRequest:
    """Within it SIGTERM and SIGUSR1 end nothing and are remembered. Python handles a signal between two of its
    instructions, so a rank that waits in a collective does when the collective is over."""

    def __init__(self) -> None:
        self._asked = asked_early()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python lets no other set a handler
            self._before = {number: signal.signal(number, self._remember) for number in STOPS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            # Who was asked once is perhaps asked again (by Slurm, and by the launcher), and has saved by now.
            signal.signal(number, signal.SIG_IGN if self._asked else handler)

    def asked(self, world: dist.ProcessGroup) -> str:
        """The signal by which a rank was asked to stop; empty when none was. Collective."""
        return next(filter(None, gather_objects(self._asked, world)), "")

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = self._asked or signal.Signals(number).name
