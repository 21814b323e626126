"""Prompts wait here for a server, and are told which one: the dispatcher in an event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from megatron_gspo.errors import NoServerError
from megatron_gspo.rollout.dispatch import Dispatcher, Ticket


class Desk:
    """Servers of one draw, on one leader. ``lost``: those that were given up, with the reason; more are added."""

    def __init__(self, dispatcher: Dispatcher, urls: Sequence[str], lost: dict[str, str]) -> None:
        self._dispatcher = dispatcher
        self._calls: dict[Ticket, asyncio.Future[str]] = {}
        self.lost = lost
        dispatcher.serve(urls)

    @property
    def up(self) -> tuple[str, ...]:
        """Servers that get prompts."""
        return self._dispatcher.up

    @contextlib.asynccontextmanager
    async def server(self, prefix: str, *, wish: str = "", avoid: frozenset[str] = frozenset()) -> AsyncIterator[str]:
        """Within it a server has a slot for a prompt. Raises NoServerError when none is left that may have it."""
        ticket, call = Ticket(prefix, wish, avoid), asyncio.get_running_loop().create_future()
        try:
            self._dispatcher.put(ticket)
        except LookupError:
            raise self._nobody() from None
        self._calls[ticket] = call
        self._grant()
        try:
            url = await call
        except BaseException:
            self._give_up(ticket, call)
            raise
        try:
            yield url
        finally:
            self._dispatcher.done(url)
            self._grant()

    def lose(self, url: str, why: str) -> None:
        """No prompt goes to this server any more, whoever has found out first."""
        if url in self.lost:
            return
        self.lost[url] = why
        for ticket in self._dispatcher.lose(url):
            call = self._calls.pop(ticket)
            if not call.done():
                call.set_exception(self._nobody())
        self._grant()

    def _grant(self) -> None:
        for ticket, url in self._dispatcher.take():
            call = self._calls.pop(ticket)
            if call.done():  # cancelled, and not back here yet
                self._dispatcher.done(url)
            else:
                call.set_result(url)

    def _give_up(self, ticket: Ticket, call: asyncio.Future[str]) -> None:
        """Whoever waited was cancelled: it leaves its queue, or the slot that it was given in the same moment."""
        if self._calls.pop(ticket, None) is not None:
            self._dispatcher.withdraw(ticket)
        elif call.done() and not call.cancelled() and call.exception() is None:
            self._dispatcher.done(call.result())
        self._grant()

    def _nobody(self) -> NoServerError:
        return NoServerError("; ".join(self.lost.values()) or "no rollout server is left")
