"""Which server is asked next, and for what. No clock, no input or output: ``rollout.desk`` waits and sends."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count


@dataclass(eq=False)
class Ticket:
    """One prompt's place in the queue."""

    prefix: str
    """What its tokens begin with, by name: requests of one prefix go to one server, whose cache has it."""
    wish: str = ""
    """The server that a plan over all leaders gives it; none where there is no plan."""
    avoid: frozenset[str] = frozenset()
    """Servers that must not get it."""
    number: int = 0
    """In the order of arrival."""


@dataclass
class _Server:
    in_flight: int = 0
    waiting: deque[Ticket] = field(default_factory=deque)

    @property
    def load(self) -> int:
        return self.in_flight + len(self.waiting)


class Dispatcher:
    """Spreads prompts over servers: each waits for its own server, and one that has nothing to do takes from the
    longest queue. What is said of one server changes nothing of the others' queues.

    A prompt's own server is the one that had its prefix before, else its plan's (``planned``), else the least loaded.

    >>> dispatcher = Dispatcher(slots=1)
    >>> dispatcher.serve(["a", "b"])
    >>> for prefix in ("p", "q", "r"): dispatcher.put(Ticket(prefix))
    >>> [(ticket.prefix, url) for ticket, url in dispatcher.take()]
    [('p', 'a'), ('q', 'b')]
    >>> dispatcher.done("b")
    >>> [(ticket.prefix, url) for ticket, url in dispatcher.take()]
    [('r', 'b')]
    """

    def __init__(self, *, slots: int | None = None, limit: int | None = None) -> None:
        """
        Args:
            slots: prompts in flight at each server; absent: its share of ``limit``.
            limit: prompts in flight at all of them together.
        """
        self._slots, self._limit = slots, limit
        self._servers: dict[str, _Server] = {}
        self._last: dict[str, str] = {}
        self._numbers = count()

    @property
    def up(self) -> tuple[str, ...]:
        """The servers that get prompts."""
        return tuple(self._servers)

    def serve(self, urls: Sequence[str]) -> None:
        """Starts afresh, with nothing in flight: these servers and no others, and no prefix is anywhere."""
        self._servers = {url: _Server() for url in urls}
        self._last.clear()

    def put(self, ticket: Ticket) -> None:
        """Lets a prompt wait. Raises LookupError where no server is left that it may go to."""
        ticket.number = next(self._numbers)
        self._queue(ticket)

    def take(self) -> list[tuple[Ticket, str]]:
        """What is to be sent now, and where: every free slot has a prompt that may take it, or none is left."""
        sent = []
        while (pair := self._next()) is not None:
            ticket, url = pair
            self._servers[url].in_flight += 1
            self._last[ticket.prefix] = url
            sent.append(pair)
        return sent

    def done(self, url: str) -> None:
        """One prompt less is in flight at a server. One that was lost since is not asked for its number."""
        if url in self._servers:
            self._servers[url].in_flight -= 1

    def withdraw(self, ticket: Ticket) -> None:
        """Takes a prompt out of the queue that it waits in, if it does."""
        for server in self._servers.values():
            if ticket in server.waiting:
                server.waiting.remove(ticket)

    def lose(self, url: str) -> list[Ticket]:
        """A server gets nothing more. What waits for it waits for others, in the order of arrival; what no other may
        have is returned."""
        lost = self._servers.pop(url, None)
        stranded = []
        for ticket in lost.waiting if lost is not None else ():
            try:
                self._queue(ticket)
            except LookupError:
                stranded.append(ticket)
        return stranded

    def _queue(self, ticket: Ticket) -> None:
        waiting = self._servers[self._own_server(ticket)].waiting
        behind = len(waiting)
        while behind and waiting[behind - 1].number > ticket.number:
            behind -= 1
        waiting.insert(behind, ticket)

    def _own_server(self, ticket: Ticket) -> str:
        allowed = [url for url in self._servers if url not in ticket.avoid]
        for url in (self._last.get(ticket.prefix, ""), ticket.wish):
            if url in allowed:
                return url
        if not allowed:
            raise LookupError(f"no server is left for {ticket.prefix!r}")
        return min(allowed, key=lambda url: self._servers[url].load)

    def _next(self) -> tuple[Ticket, str] | None:
        if self._limit is not None and sum(server.in_flight for server in self._servers.values()) >= self._limit:
            return None
        free = [url for url, server in self._servers.items() if server.in_flight < self._share]
        free.sort(key=lambda url: self._servers[url].in_flight)
        for url in free:
            if self._servers[url].waiting:
                return self._servers[url].waiting.popleft(), url
        longest = sorted(self._servers.values(), key=lambda server: -len(server.waiting))
        for url in free:
            for server in longest:
                for ticket in server.waiting:
                    if url not in ticket.avoid:
                        server.waiting.remove(ticket)
                        return ticket, url
        return None

    @property
    def _share(self) -> int:
        if self._slots is not None:
            return self._slots
        return 1 << 30 if self._limit is None else -(-self._limit // max(1, len(self._servers)))


def planned(count: int, urls: Sequence[str], first: int = 0) -> list[str]:
    """The servers of ``count`` prompts of one leader, in their order.

    ``first``: prompts of the leaders before it, which are asked for at the same time: over all leaders the numbers of
    prompts that servers get differ by one at most.

    >>> planned(3, ["a", "b"], first=1)
    ['b', 'a', 'b']
    """
    return [urls[(first + index) % len(urls)] for index in range(count)] if urls else [""] * count


def shares(counts: Collection[int]) -> list[int]:
    """``first`` of each leader, by how many prompts each asks for.

    >>> shares([3, 2, 4])
    [0, 3, 5]
    """
    firsts, total = [], 0
    for each in counts:
        firsts.append(total)
        total += each
    return firsts
