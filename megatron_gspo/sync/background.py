"""Work in threads of its own, so that a transfer and the next gather overlap. Failures are kept and handed back."""

from __future__ import annotations

from collections.abc import Callable
from queue import Queue
from typing import Generic, TypeVar

from megatron_gspo.calls import start

T = TypeVar("T")


class Pump(Generic[T]):
    """Calls ``action`` on every item in order, in the background; ``put`` waits while ``depth`` items are under way.

    After a failure items are taken and dropped, so that nobody who puts waits for ever; ``close`` raises it.
    """

    def __init__(self, action: Callable[[T], None], depth: int = 1) -> None:
        self._action = action
        self._items: Queue[T | None] = Queue(maxsize=depth)
        self._done = start(self._run)

    def put(self, item: T) -> None:
        """Hands over one item; raises what the thread has raised."""
        self._items.put(item)

    def close(self) -> None:
        """Waits for every item; raises the first failure."""
        self._items.put(None)
        self._done.result()

    def _run(self) -> None:
        failure: Exception | None = None
        while (item := self._items.get()) is not None:
            if failure is None:
                try:
                    self._action(item)
                except Exception as error:
                    failure = error
            del item  # while waiting for the next one, nothing keeps this one's memory
        if failure is not None:
            raise failure
