"""One HTTP request to a server, bounded in time and in bytes; and work in a thread of its own."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

SERVER_KEY = "MEGATRON_GSPO_SERVER_KEY"
"""Environment variable with the key of servers that somebody else has started (SGLang's ``--api-key``)."""
MOST_BYTES = 16 * 2**20
"""Of the answer to a question about a server; its settings take some ten thousand."""
_CHUNK = 2**20
T = TypeVar("T")


class OverlongReplyError(http.client.HTTPException):
    """A reply that is longer than anything that was asked for."""


@dataclass(frozen=True)
class Reply:
    """What a server answered."""

    status: int
    """Of HTTP. A redirect is one too: it is not followed."""
    body: bytes


def start(action: Callable[[], T]) -> Future[T]:
    """Runs ``action`` in a daemon thread: one that hangs in a transfer does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def refusal(status: int) -> str:
    """How a request was refused: "HTTP 400", and what to do where a key is missing."""
    asks = status in (401, 403)
    return f"HTTP {status}; it asks for another key: set ${SERVER_KEY} to its --api-key" if asks else f"HTTP {status}"


def call(
    url: str, body: bytes | None = None, *, key: str = "", timeout_s: float, most_bytes: int = MOST_BYTES
) -> Reply:
    """GETs ``url``, or POSTs ``body`` (JSON) to it; directly, whatever proxies the environment names.

    Args:
        url: ``http://HOST:PORT/path?query``, or https.
        body: what is sent, or None.
        key: sent as ``Authorization: Bearer KEY``; none when empty.
        timeout_s: seconds for all of it, from connecting to the last byte. (A timeout of sockets alone is one per
            byte: a server that sends one now and then would never exceed it.)
        most_bytes: a longer reply is not read to its end.

    Raises TimeoutError (an OSError), OSError when the connection fails, and HTTPException for what is not HTTP and,
    as OverlongReplyError, for a reply of more bytes.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with contextlib.closing(connection), _Deadline(connection, timeout_s) as deadline:
        connection.connect()
        deadline.sock = connection.sock  # which it forgets when a reply says that it is the last one
        connection.request("GET" if body is None else "POST", target, body, headers)
        response = connection.getresponse()
        return Reply(response.status, _read(response, most_bytes))


def _read(response: http.client.HTTPResponse, most_bytes: int) -> bytes:
    parts, size = [], 0
    while part := response.read(_CHUNK):
        size += len(part)
        if size > most_bytes:
            raise OverlongReplyError(f"its reply goes on after {most_bytes} bytes, the most that this may take")
        parts.append(part)
    return b"".join(parts)


class _Deadline:
    """Shuts the connection when the time is up, which ends whatever waits for it, and turns that into TimeoutError."""

    def __init__(self, connection: http.client.HTTPConnection, timeout_s: float) -> None:
        self.sock: socket.socket | None = None
        self._connection, self._timeout_s = connection, timeout_s
        self._expired = False
        self._timer = threading.Timer(timeout_s, self._end)
        self._timer.daemon = True

    def __enter__(self) -> Self:
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._expired and (error is None or isinstance(error, Exception)):  # what was read may be half a reply
            raise TimeoutError(f"timed out after {self._timeout_s:g} s") from None

    def _end(self) -> None:
        self._expired = True
        sock = self.sock or self._connection.sock
        with contextlib.suppress(OSError):  # it has ended by itself
            if sock is not None:
                sock.shutdown(socket.SHUT_RDWR)
