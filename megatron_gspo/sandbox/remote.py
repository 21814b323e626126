"""What the clients of servers have in common: which server is asked, how often, and what is said when none answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

import aiohttp

from megatron_gspo.calls import key_in
from megatron_gspo.config.sandbox import SandboxConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.sandbox.interface import Outcome
from megatron_gspo.sandbox.local import failed

EACH = 64
"""Programs at once that a server is sent, unless ``sandbox.concurrency`` says otherwise."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 5.0
"""Before a program is sent again: the first time, and at most; it doubles."""
AGAIN = frozenset({429, 500, 502, 503, 504})
"""Statuses of HTTP after which a program is sent again."""
T = TypeVar("T")


class AwayError(Exception):
    """A server that cannot be reached, went away, or is too busy: another time it may do."""


class Servers:
    """The servers of ``sandbox.servers``."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._busy = dict.fromkeys((url.rstrip("/") for url in config.servers), 0)
        self._away: dict[str, int] = dict.fromkeys(self._busy, 0)

    async def open(self) -> None:
        """Within an event loop. Raises ConfigError for a key that cannot be read."""
        file = self._config.key_file
        key = key_in(Path(file), f'sandbox.key_file = "{file}"') if file else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._slots = asyncio.Semaphore(self._config.concurrency or EACH * len(self._busy))
        connector = aiohttp.TCPConnector(limit=0)
        self.http = aiohttp.ClientSession(headers=headers, connector=connector, auto_decompress=False)

    async def close(self) -> None:
        """Closes every connection."""
        await self.http.close()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One of the programs at once."""
        async with self._slots:
            yield

    async def ask(self, action: Callable[[str], Awaitable[T]]) -> T | Outcome:
        """``action`` of the server that has least to do, of another one where it is away, and again; the outcome
        ``FAILED`` where that does not help. ``action`` raises AwayError, OSError or TimeoutError, or what aiohttp
        does, for what may go better another time."""
        wait_s, last = FIRST_WAIT_S, Exception("never asked")
        for attempt in range(self._config.retries + 1):
            if attempt:
                await asyncio.sleep(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            url = min(self._busy, key=lambda one: (self._away[one], self._busy[one]))
            self._busy[url] += 1
            try:
                done = await action(url)
                self._away[url] = 0
                return done
            except (AwayError, aiohttp.ClientError, OSError, TimeoutError) as error:
                self._away[url] += 1
                last = AwayError(f"{_named(url)}: {type(error).__name__}: {error}")
            finally:
                self._busy[url] -= 1
        return failed(AwayError(f"asked {self._config.retries + 1} times, last {last}"))

    async def check(self, path: str) -> None:
        """Raises ConfigError where a server answers that is none of these, or asks for another key; one that is away
        is none of a configuration's mistakes."""
        for url in self._busy:
            try:
                async with self.http.get(
                    url + path, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=10)
                ) as reply:
                    status = reply.status
            except (aiohttp.ClientError, OSError, TimeoutError):
                continue
            if status in (401, 403):
                raise ConfigError(
                    f"{_named(url)} asks for another key (HTTP {status}): sandbox.key_file names the file that holds it"
                )
            if status not in AGAIN and status != 200:
                raise ConfigError(f"{_named(url)} is no sandbox server: GET {path} is answered with HTTP {status}")


class Lent:
    """A sandbox on servers of ``sandbox.servers``: its connections live as long as its block."""

    check = ""
    """The path by which one shows that it is of this kind; nothing is asked when empty."""

    def __init__(self, config: SandboxConfig) -> None:
        self._servers = Servers(config)

    async def __aenter__(self) -> Self:
        """Raises ConfigError for a key that cannot be read or is refused, and for another kind of server. A server
        that is away raises nothing: runs are ``FAILED`` while it is."""
        await self._servers.open()
        try:
            if self.check:
                await self._servers.check(self.check)
        except ConfigError:
            await self._servers.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._servers.close()


def _named(url: str) -> str:
    return urlsplit(url)._replace(query="", fragment="").geturl()
