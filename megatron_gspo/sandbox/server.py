"""``megatron-gspo sandbox serve``: the local sandbox, for clients on other machines that have its key.

A connection (a WebSocket) is one program: a message loads it, each further one is an input, each is answered with an
outcome. When the connection ends, so does what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import signal
from collections.abc import Callable
from pathlib import Path

from aiohttp import WSMsgType, web
from aiohttp.http import HttpProcessingError

from megatron_gspo.calls import key_in
from megatron_gspo.errors import ConfigError
from megatron_gspo.sandbox import wire
from megatron_gspo.sandbox.interface import MIB, Program
from megatron_gspo.sandbox.languages import LANGUAGES
from megatron_gspo.sandbox.local import LocalSandbox

CHECK, RUN = "/check", "/run"
HEARTBEAT_S = 20.0
"""Seconds between the signs of life that each end asks of the other."""
MOST_BYTES = 256 * MIB
"""Of a message: a program with its files, or an input."""
MOST_AHEAD = 2
"""Messages that are kept for later: the client waits for an answer before it sends the next one."""
SANDBOX = web.AppKey("sandbox", LocalSandbox)
KEY = web.AppKey("key", str)


def shared_key(path: Path) -> str:
    """The key in a file, which is made, for its owner alone, where it is missing. Raises ConfigError."""
    with contextlib.suppress(FileExistsError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
    return key_in(path, f"--key-file {path}")


def application(sandbox: LocalSandbox, key: str) -> web.Application:
    """What answers. ``sandbox`` is entered."""
    app = web.Application(middlewares=[_with_key])
    app[SANDBOX], app[KEY] = sandbox, key
    app.add_routes([web.get(CHECK, _check), web.get(RUN, _run)])
    return app


def runner_of(app: web.Application) -> web.AppRunner:
    """What lets ``application`` answer, and logs nothing that a client has sent."""
    return web.AppRunner(app, access_log=None, logger=_logger(), handler_cancellation=True, shutdown_timeout=1)


async def serve(sandbox: LocalSandbox, host: str, port: int, key: str, say: Callable[[str], None]) -> None:
    """Answers until SIGTERM or SIGINT. Raises ConfigError where it cannot listen."""
    ended = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, ended.set)
    async with sandbox:
        runner = runner_of(application(sandbox, key))
        await runner.setup()
        try:
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                raise ConfigError(f"cannot listen at --host {host} --port {port}: {error}") from None
            at, bound = runner.addresses[0][:2]
            say(f"sandbox: http://{f'[{at}]' if ':' in at else at}:{bound}, {sandbox.concurrency} programs at once")
            await ended.wait()
        finally:
            await runner.cleanup()


def _logger() -> logging.Logger:
    """For errors of this program's own. What no request can be read in is told to its sender alone: aiohttp's words
    about it quote it, and a key may stand there."""
    logger = logging.getLogger(__name__)
    logger.addFilter(_is_ours)
    return logger


def _is_ours(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


@web.middleware
async def _with_key(request: web.Request, handler: Callable[..., object]) -> web.StreamResponse:
    given = request.headers.get("Authorization", "").encode(errors="surrogateescape")  # as aiohttp has decoded it
    if not hmac.compare_digest(given, f"Bearer {request.app[KEY]}".encode()):
        return web.json_response({"error": "another key is needed"}, status=401)
    return await handler(request)  # type: ignore[misc]


async def _check(request: web.Request) -> web.Response:
    return web.json_response({"languages": list(LANGUAGES), "concurrency": request.app[SANDBOX].concurrency})


async def _run(request: web.Request) -> web.WebSocketResponse:
    """One program, until it is done, or its client is gone: then what runs is ended, and what waits forgotten."""
    connection = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MOST_BYTES, compress=False)
    await connection.prepare(request)
    messages: asyncio.Queue[bytes] = asyncio.Queue(MOST_AHEAD)
    work = asyncio.create_task(_program(request.app[SANDBOX], connection, messages))
    reading = asyncio.create_task(_read(connection, messages))
    try:
        await asyncio.wait({work, reading}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (work, reading):
            task.cancel()
        for ended in await asyncio.gather(work, reading, return_exceptions=True):
            if isinstance(ended, ConfigError | ValueError):  # a client of another version
                await connection.close(code=1008, message=str(ended).encode()[:120])
    return connection


async def _read(connection: web.WebSocketResponse, messages: asyncio.Queue[bytes]) -> None:
    async for message in connection:
        if message.type is WSMsgType.BINARY:
            if messages.full():
                raise ValueError(f"more than {MOST_AHEAD} messages ahead of what has been answered")
            messages.put_nowait(message.data)


async def _program(sandbox: LocalSandbox, connection: web.WebSocketResponse, messages: asyncio.Queue[bytes]) -> None:
    language, source, files, limits = wire.to_program(wire.unpack(await messages.get()))
    async with sandbox.session(Program(language, source.decode(), files), limits) as (session, refused):
        if refused is not None:
            await connection.send_bytes(wire.of_outcome(refused))
            return
        await connection.send_bytes(wire.pack({"ready": True}))
        while True:
            _, (given,) = wire.unpack(await messages.get())
            await connection.send_bytes(wire.of_outcome(await session.run(given)))
