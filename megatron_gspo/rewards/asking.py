"""Another server's answer over HTTP: bounded in time and bytes, asked again where that may help."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

from megatron_gspo.calls import named_key, refusal
from megatron_gspo.errors import ConfigError, RewardError

if TYPE_CHECKING:
    import aiohttp

MOST_BYTES = 4 * 2**20
"""Of an answer."""
LONGEST_WAIT_S = 30.0
MISTAKEN = (401, 403, 404, 405)
"""Statuses that no other response would change: a wrong key or a wrong address."""
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses that another try may change; every other one from 500 on is too."""
LOST_WAIT_S = 2.0
"""Seconds between questions to a server that may be there again."""


class NoAnswerError(Exception):
    """A server has given no usable answer to one question: the response stays ungraded."""


class Service:
    """One or more servers that answer alike, asked in turn.

    Args:
        urls: where the question is posted, ``http://`` or ``https://``.
        key: sent as ``Authorization: Bearer KEY``; none when empty.
        timeout_s: seconds for one try, from connecting to the last byte.
        retries: further tries, each of the next server, after connection losses, timeouts, HTTP 408, 429 and 5xx, and
            answers that are no JSON.
        backoff_s: seconds before the first of them, doubled each time, or what the server asks for (``Retry-After``);
            at most 30.
        patience_s: for so long a question that has lost its server is asked again without that being counted: servers
            that the run has started are started again meanwhile.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        key: str = "",
        timeout_s: float = 60.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        patience_s: float = 0.0,
    ) -> None:
        self._urls, self._key, self._timeout_s = list(urls), key, timeout_s
        self._retries, self._backoff_s, self._patience_s = retries, backoff_s, patience_s
        self._session: aiohttp.ClientSession | None = None
        self._asked = 0
        self._spread = random.Random(0)  # its own: the generators of a run repeat

    async def __aenter__(self) -> Self:
        import aiohttp

        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # reward.concurrency is the limit
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            headers=headers,
            auto_decompress=False,  # a small body may hold a large one
        )
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    async def ask(self, body: dict[str, Any]) -> Any:
        """The JSON that a server answers. Raises NoAnswerError where there is none after all tries, RewardError for
        what is wrong with every question: the key or the address."""
        import aiohttp

        if not self._urls:
            raise RewardError("the servers of [reward_server] are not started yet: they start with a run, or with eval")
        lost = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, TimeoutError, OSError)
        wait, asked, counted, began = 0.0, 0, 0, time.monotonic()
        turn = self._asked = self._asked + 1
        while True:
            await asyncio.sleep(wait)
            url = self._urls[(turn + asked) % len(self._urls)]
            asked, is_lost, after = asked + 1, False, None
            try:
                status, after, found = await self._post(url, body)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError, RecursionError) as error:
                told = f"timed out after {self._timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
                failure, is_lost = f"{url}: {type(error).__name__}: {told[:200]}", isinstance(error, lost)
            else:
                if status == 200:
                    return found
                failure = _refused(url, status, found)
            if is_lost and time.monotonic() - began < self._patience_s:
                wait = min(LOST_WAIT_S, self._pause(min(asked, 8), None))
                continue
            if counted == self._retries:
                raise NoAnswerError(f"{failure} (asked {asked} times)")
            wait, counted = self._pause(counted, after), counted + 1

    async def _post(self, url: str, body: dict[str, Any]) -> tuple[int, str | None, Any]:
        """(status, Retry-After, JSON of the answer; its text where it was refused)."""
        assert self._session is not None, "within its lifetime"
        async with self._session.post(url, json=body, allow_redirects=False) as response:
            parts, size = [], 0
            async for part in response.content.iter_chunked(2**16):
                size += len(part)
                if size > MOST_BYTES:
                    raise ValueError(f"its answer goes on after {MOST_BYTES} bytes")
                parts.append(part)
            text = b"".join(parts).decode(errors="replace")
            found = json.loads(text) if response.status == 200 else text
            return response.status, response.headers.get("Retry-After"), found

    def _pause(self, number: int, asked: str | None) -> float:
        """Seconds before the next try; spread, so that not all come back at once."""
        wanted = self._backoff_s * 2**number * (0.5 + self._spread.random())
        if asked is not None and re.fullmatch("[0-9]{1,9}", asked.strip()):
            wanted = max(wanted, float(asked))
        return min(wanted, LONGEST_WAIT_S)


class Asking:
    """A reward that asks a ``Service``: its connections live as long as a scoring, and what comes too late leaves the
    response ungraded."""

    on_timeout = "ungraded"
    _service: Service

    async def __aenter__(self) -> None:
        await self._service.__aenter__()

    async def __aexit__(self, *error: object) -> None:
        await self._service.__aexit__(*error)


def check_urls(name: str, urls: object) -> list[str]:
    """Addresses as a reward is given them. Raises ConfigError, without what might be a key."""
    given = [urls] if isinstance(urls, str) else list(urls) if isinstance(urls, (list, tuple)) else []
    for url in given:
        if not _is_address(url):
            raise ConfigError(
                f"reward {name!r}: a url is http://HOST:PORT/..., or https, without a user or a key in it "
                f"(key_variable and key_file name one)"
            )
    if not given:
        raise ConfigError(f"reward {name!r} needs url, the address of its server, or a list of them")
    return given


def _is_address(url: object) -> bool:
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        return False
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
        )
    except ValueError:  # no port, or no address of IPv6
        return False


def read_key(name: str, variable: str, file: str) -> str:
    """The key that a reward's ``key_variable`` or ``key_file`` names. Raises ConfigError."""
    try:
        return named_key(variable, file)
    except ConfigError as error:
        raise ConfigError(f"reward {name!r}: {' '.join(str(error).split())}") from None


def check_model(name: str, model: str, max_tokens: int) -> None:
    """Raises ConfigError for a language model that nobody could ask."""
    if not model or max_tokens < 1:
        raise ConfigError(f"reward {name!r}: model = {model!r} is a name, and max_tokens = {max_tokens} 1 or more")


def check_asking(name: str, timeout_s: float, retries: int) -> None:
    """Raises ConfigError for limits that are none."""
    if not (timeout_s > 0 and 0 <= retries <= 20):
        raise ConfigError(f"reward {name!r}: timeout_s = {timeout_s} is above 0, and retries = {retries} in 0 to 20")


def _refused(url: str, status: int, found: Any) -> str:
    """How a question was refused that may be asked again. Raises NoAnswerError where it may not, and RewardError where
    every other one would be refused too."""
    said = refusal(status) if status in (401, 403) else f"HTTP {status}"
    failure = ": ".join(filter(None, (url, said, _text(found))))
    if status in MISTAKEN:
        raise RewardError(failure)
    if status not in PASSING and status < 500:
        raise NoAnswerError(failure)
    return failure


def _text(found: Any) -> str:
    text = " ".join(str(found)[:1000].split())[:200]
    return "".join(character if character.isprintable() else "?" for character in text)
