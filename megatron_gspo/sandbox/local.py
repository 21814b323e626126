"""Programs on this machine: a pool of keepers, each of which runs one program at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from megatron_gspo.config.sandbox import SandboxConfig
from megatron_gspo.errors import ConfigError
from megatron_gspo.sandbox import box, wire
from megatron_gspo.sandbox.checks import checked, other_user, settings_here, why_not
from megatron_gspo.sandbox.interface import Limits, Outcome, Program, Verdict
from megatron_gspo.sandbox.languages import COMPILE, LANGUAGES

PACKAGE = Path(__file__).parent
BEGIN = """
import sys, types
for name, path in {packages}:
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
from megatron_gspo.sandbox.keeper import main
main({control}, {headers})
"""
"""A keeper's program: without what the packages import at their top, it starts in hundredths of a second."""
GRACE_S = 30.0
"""Seconds beyond its limits after which a keeper that has not answered is given up."""
END_S = 10.0
"""Seconds that a keeper has to end what it has started."""


class LostKeeperError(Exception):
    """A keeper has ended, or does not answer."""


class KeeperProcess:
    """A keeper, as its client has it."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._process, self._reader, self._writer = process, reader, writer

    @classmethod
    async def start(cls, settings: box.Settings, headers: int) -> KeeperProcess:
        """Starts one; ``headers``: descriptor of the file for precompiled headers."""
        ours, theirs = socket.socketpair()
        with theirs:
            packages = [("megatron_gspo", str(PACKAGE.parent)), ("megatron_gspo.sandbox", str(PACKAGE))]
            code = BEGIN.format(packages=packages, control=theirs.fileno(), headers=headers)
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), headers),
                start_new_session=True,  # Ctrl-C is for the client, which then ends it
                env={"PATH": "/usr/bin:/bin", "TMPDIR": os.environ.get("TMPDIR", "")},
            )
        try:
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()  # which ends it
            process.wait()
            raise
        keeper = cls(process, reader, writer)
        uid = None if settings.uid is None else other_user()  # each its own, of which nothing else is
        writer.write(wire.pack(asdict(replace(settings, uid=uid))))
        return keeper

    async def ask(self, message: bytes, within_s: float) -> wire.Message:
        """Sends a message and returns the answer. Raises LostKeeperError."""
        try:
            async with asyncio.timeout(within_s + GRACE_S):
                self._writer.write(message)
                await self._writer.drain()
                (length,) = wire.PREFIX.unpack(await self._reader.readexactly(wire.PREFIX.size))
                header = json.loads(await self._reader.readexactly(length))
                return header, [await self._reader.readexactly(size) for size in header["sizes"]]
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise LostKeeperError(f"{type(error).__name__}: {error}") from None

    async def close(self) -> None:
        """Ends it and all that it has started, and waits until that is done."""
        self._writer.close()
        try:
            async with asyncio.timeout(END_S):
                while self._process.poll() is None:
                    await asyncio.sleep(0.002)
        except TimeoutError:
            self._process.kill()  # bubblewrap ends with its parent
        finally:
            if self._process.poll() is None:
                self._process.kill()
            self._process.wait()


class Session:
    """A program on a keeper of its own, until the session ends."""

    def __init__(self, sandbox: LocalSandbox, program: Program, source: bytes, limits: Limits) -> None:
        self._sandbox, self._program, self._source, self._limits = sandbox, program, source, limits
        self._keeper: KeeperProcess | None = None
        self._asking = False

    async def load(self) -> Outcome | None:
        """Makes the program ready; the outcome of compiling where it is not."""
        language = LANGUAGES[self._program.language]
        precompiled = language.header_words in self._source and await self._sandbox.precompiled(self._program.language)
        message = wire.of_program(self._program, self._source, self._limits, precompiled=precompiled)
        try:
            self._keeper = await self._sandbox.take()
            return await self._ask(message, COMPILE.wall_s)
        except OSError as error:  # no process more, no descriptor more
            return failed(error)

    async def run(self, given: bytes) -> Outcome:
        """One run."""
        if self._keeper is None and (refused := await self.load()) is not None:
            return refused
        answer = await self._ask(wire.pack({"run": True}, [given]), self._limits.wall_s)
        return failed(LostKeeperError("no outcome")) if answer is None else answer

    async def _ask(self, message: bytes, within_s: float) -> Outcome | None:
        assert self._keeper is not None
        self._asking = True
        try:
            answer = wire.to_outcome(await self._keeper.ask(message, within_s))
            self._asking = False
            return answer
        except (LostKeeperError, ValueError) as error:
            await self.close()
            return failed(error)

    async def close(self) -> None:
        """Gives the keeper back; one that was asked and has not answered is ended, with what it runs."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            await self._sandbox.give(keeper, sound=not self._asking)
            self._asking = False


class LocalSandbox:
    """Runs programs on this machine. A ``Sandbox``, which may be entered again."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self.concurrency = config.concurrency or len(os.sched_getaffinity(0))

    async def __aenter__(self) -> Self:
        """Raises ConfigError where programs cannot be run here, with what to do."""
        self._settings = settings_here(self._config)
        self._slots = asyncio.Semaphore(self.concurrency)
        self._idle: list[KeeperProcess] = []
        self._keepers: set[KeeperProcess] = set()
        self._headers = os.memfd_create("headers", os.MFD_CLOEXEC)
        self._with_headers: dict[str, asyncio.Task[bool]] = {}
        try:
            first = await self.run(Program("python", "print(6 * 7)"), [b""], Limits())
            if first[0].verdict is not Verdict.OK or first[0].stdout != b"42\n":
                raise ConfigError(why_not(self._settings, first[0]))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for task in self._with_headers.values():
            task.cancel()
        await asyncio.gather(*self._with_headers.values(), return_exceptions=True)
        await asyncio.gather(*(keeper.close() for keeper in self._keepers))
        os.close(self._headers)

    async def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        limits: Limits,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        """As a ``Sandbox`` has it."""
        async with self.session(program, limits) as (session, refused):
            return [refused] if refused is not None else await in_order(session.run, inputs, go_on)

    @contextlib.asynccontextmanager
    async def session(self, program: Program, limits: Limits) -> AsyncIterator[tuple[Session, Outcome | None]]:
        """A program that is ready to be run, or the outcome of compiling it. Its turn has come then."""
        source, refused = checked(program)
        session = Session(self, program, source, limits)
        if refused is not None:
            yield session, refused
            return
        async with self._slots:
            try:
                yield session, await session.load()
            finally:
                await asyncio.shield(session.close())

    async def take(self) -> KeeperProcess:
        """A keeper that does nothing else. Raises OSError where none can be started."""
        if self._idle:
            return self._idle.pop()
        keeper = await KeeperProcess.start(self._settings, self._headers)
        self._keepers.add(keeper)
        return keeper

    async def give(self, keeper: KeeperProcess, *, sound: bool) -> None:
        """Takes a keeper back; one that may be in the middle of something is ended with what it runs."""
        if sound:
            self._idle.append(keeper)
        else:
            await keeper.close()
            self._keepers.discard(keeper)

    async def precompiled(self, language: str) -> bool:
        """Whether there is a precompiled header for a language; it is made when it is first asked for."""
        if not LANGUAGES[language].header:
            return False
        if language not in self._with_headers:
            self._with_headers[language] = asyncio.create_task(self._precompile(language))
        return await asyncio.shield(self._with_headers[language])

    async def _precompile(self, language: str) -> bool:
        keeper = await KeeperProcess.start(self._settings, self._headers)
        try:
            made = wire.to_outcome(await keeper.ask(wire.pack({"header": language}), COMPILE.wall_s))
        except LostKeeperError:
            return False
        finally:
            await keeper.close()
        if made is None or made.verdict is not Verdict.OK:
            return False
        with open(self._headers, "wb", closefd=False) as file:
            file.write(made.stdout)
        return True


def failed(error: Exception) -> Outcome:
    """The outcome of a run that the sandbox could not do."""
    return Outcome(Verdict.FAILED, None, b"", f"{type(error).__name__}: {error}".encode(), 0.0, 0.0)


async def in_order(
    run: Callable[[bytes], Awaitable[Outcome]], inputs: Sequence[bytes], go_on: Callable[[int, Outcome], bool] | None
) -> list[Outcome]:
    """The outcomes of ``run``, one input after the other, until ``go_on`` says no."""
    outcomes = []
    for index, given in enumerate(inputs):
        outcomes.append(await run(given))
        if go_on is not None and not go_on(index, outcomes[-1]):
            break
    return outcomes
