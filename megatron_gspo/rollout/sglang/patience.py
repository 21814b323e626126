"""How long what was asked of a server may take: as long as the server makes progress."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

GAP = 0.1
"""Of the limit: the time between two looks at what a silent server is doing."""
DEAF = 3
"""Questions in a row without an answer of any kind, after which nobody is there."""


class Patience:
    """Gives up all requests to one server when it has done nothing for ``timeout_s``.

    Thousands of requests lie in its queue for as long as those before them take, which says nothing of the server: so
    nobody counts how long one request waits. Progress is an answer to any of them, or, once a limit has passed without
    one, work that is different from what it was a moment ago: responses of many thousand tokens may take longer than
    the limit each. ``work`` says what the server has done so far, in whatever form; None when it does not say.

    A server that does not even answer ``hears``, ``DEAF`` times in a row and ``every_s`` apart, is given up before.
    """

    def __init__(
        self,
        timeout_s: float,
        work: Callable[[], Awaitable[object]],
        hears: Callable[[], Awaitable[bool]],
        every_s: float,
    ) -> None:
        self._timeout_s = timeout_s
        self._work = work
        self._hears, self._every_s = hears, every_s
        self.deaf = False
        """Whether requests were given up because nobody was there."""
        self._limits: set[asyncio.Timeout] = set()
        self._watch: asyncio.Task[None] | None = None
        self._knocking: asyncio.Task[None] | None = None
        self._last = 0.0

    @contextlib.asynccontextmanager
    async def wait(self) -> AsyncIterator[None]:
        """Within it a request is under way; its end is progress. Raises TimeoutError when the server makes none."""
        async with asyncio.timeout(None) as limit:
            if not self._limits:
                self._last = asyncio.get_running_loop().time()
                self.deaf = False
                self._watch = asyncio.create_task(self._give_up_in_time())
                self._knocking = asyncio.create_task(self._knock())
            self._limits.add(limit)
            try:
                yield
                self._last = asyncio.get_running_loop().time()
            finally:
                self._limits.discard(limit)
                if not self._limits and self._watch is not None and self._knocking is not None:
                    self._watch.cancel()
                    self._knocking.cancel()

    async def _give_up_in_time(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            while (left := self._last + self._timeout_s - clock()) > 0:
                await asyncio.sleep(left)
            silent_since = self._last
            if not await self._works() and self._last == silent_since:
                break
            self._last = max(self._last, clock())
        self._give_up()

    async def _knock(self) -> None:
        clock = asyncio.get_running_loop().time
        unanswered = 0
        while unanswered < DEAF:
            begin = clock()
            heard = self._last > begin - self._every_s or await self._hears()
            unanswered = 0 if heard else unanswered + 1
            await asyncio.sleep(begin + self._every_s - clock())
        self.deaf = True
        self._give_up()

    def _give_up(self) -> None:
        for limit in self._limits:
            limit.reschedule(asyncio.get_running_loop().time())

    async def _works(self) -> bool:
        """Whether the server's work goes on while one looks."""
        try:
            async with asyncio.timeout(self._timeout_s):
                before = await self._work()
                await asyncio.sleep(GAP * self._timeout_s)
                return before is not None and await self._work() != before
        except TimeoutError:
            return False
