"""One HTTP request to a server, bounded in time and in bytes; and work in a thread of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

from megatron_gspo.errors import ConfigError
from megatron_gspo.untrusted import open_regular

SERVER_KEY = "MEGATRON_GSPO_SERVER_KEY"
"""Environment variable with the key of servers that somebody else has started (SGLang's ``--api-key``)."""
SERVER_KEY_FILE = "MEGATRON_GSPO_SERVER_KEY_FILE"
"""Environment variable: the file that holds that key alone, and that nobody but its owner may open (mode 0600)."""
MOST_KEY = 4096
"""Characters of a key."""
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


def server_key(environment: Mapping[str, str] = os.environ) -> str:
    """The key of servers that somebody else has started: the value of ``SERVER_KEY``, or what the file of
    ``SERVER_KEY_FILE`` holds; "" where neither is set.

    Raises ConfigError, without a character of the key, for both, for a file that others may open or that cannot be
    read, and for what cannot be sent as a key.
    """
    key, file = environment.get(SERVER_KEY, ""), environment.get(SERVER_KEY_FILE, "")
    if key and file:
        raise ConfigError(f"{SERVER_KEY} and {SERVER_KEY_FILE} = {file} are both set: unset one of them")
    if file:
        return key_in(Path(file), f"{SERVER_KEY_FILE} = {file}")
    return _sendable(key, SERVER_KEY) if key else ""


def named_key(variable: str = "", file: str = "", environment: Mapping[str, str] = os.environ) -> str:
    """A key by the name of the environment variable, or of the private file, that holds it; "" where neither is named.

    Raises ConfigError as ``server_key`` does, and for a variable that is not set.
    """
    if variable and file:
        raise ConfigError(f"the key is named twice, by ${variable} and by {file}: leave one of them out")
    if file:
        return key_in(Path(file), file)
    if variable and not environment.get(variable):
        raise ConfigError(f"the environment variable {variable}, which is to hold a key, is not set")
    return _sendable(environment[variable], variable) if variable else ""


def key_in(path: Path, named: str) -> str:
    """The key that a file holds, which errors call ``named``. Raises ConfigError as ``server_key`` does."""
    return _sendable(_read_key(path, named), named)


def _read_key(path: Path, named: str) -> bytes:
    try:
        with open_regular(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise ConfigError(
                    f"{named} has mode {mode:04o}, so others can open it: chmod 600 {path}, and "
                    f"change the key if they may have read it"
                )
            return file.read(MOST_KEY + 3).removesuffix(b"\n").removesuffix(b"\r")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{named} cannot be read: {error}") from None


def _sendable(key: str | bytes, where: str) -> str:
    """A key that fits in a line of HTTP. http.client would say all of one that does not, in its error."""
    text = key if isinstance(key, str) else key.decode("latin-1")
    if not re.fullmatch(f"[!-~]{{1,{MOST_KEY}}}", text):
        raise ConfigError(
            f"{where} holds no key: a key is one line of 1 to {MOST_KEY} ASCII characters without spaces, and this "
            f"has {len(text)} characters, {len(text.splitlines())} lines"
        )
    return text


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
