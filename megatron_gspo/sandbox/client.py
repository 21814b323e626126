"""Programs on the machine of a ``megatron-gspo sandbox serve``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import aiohttp

from megatron_gspo.sandbox import wire
from megatron_gspo.sandbox.checks import checked
from megatron_gspo.sandbox.interface import Limits, Outcome, Program
from megatron_gspo.sandbox.local import GRACE_S
from megatron_gspo.sandbox.remote import AwayError, Lent
from megatron_gspo.sandbox.server import CHECK, HEARTBEAT_S, MOST_BYTES, RUN

Connection = aiohttp.ClientWebSocketResponse


class ServerSandbox(Lent):
    """A ``Sandbox`` that servers lend. A connection a program: what ``go_on`` says is said before the next input."""

    check = CHECK

    async def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        limits: Limits,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        """As a ``Sandbox`` has it. Where a connection is lost, the program is loaded elsewhere or again, and goes on
        with the input whose outcome has not come."""
        source, refused = checked(program)
        if refused is not None:
            return [refused]
        job = _Job(wire.of_program(program, source, limits), inputs, limits, go_on)
        async with self._servers.turn():
            lost = await self._servers.ask(lambda url: job.on(self._servers.http, url))
        return job.outcomes if lost is None else [*job.outcomes, lost]


class _Job:
    """A program and its inputs, and how far it has come."""

    def __init__(
        self, program: bytes, inputs: Sequence[bytes], limits: Limits, go_on: Callable[[int, Outcome], bool] | None
    ) -> None:
        self._program, self._inputs, self._limits, self._go_on = program, inputs, limits, go_on
        self.outcomes: list[Outcome] = []

    async def on(self, http: aiohttp.ClientSession, url: str) -> None:
        """Goes on at a server, to the end."""
        async with http.ws_connect(url + RUN, heartbeat=HEARTBEAT_S, max_msg_size=MOST_BYTES) as connection:
            await connection.send_bytes(self._program)
            if (refused := await _answer(connection, None)) is not None:
                self.outcomes = [refused]
                return
            for index in range(len(self.outcomes), len(self._inputs)):
                await connection.send_bytes(wire.pack({"run": True}, [self._inputs[index]]))
                outcome = await _answer(connection, self._limits.wall_s + GRACE_S)
                if outcome is None:
                    raise AwayError("its answer is none")
                self.outcomes.append(outcome)
                if self._go_on is not None and not self._go_on(index, outcome):
                    return


async def _answer(connection: Connection, within_s: float | None) -> Outcome | None:
    """The next outcome; None where a program is ready. Its turn may take long: only its connection is watched then."""
    message = await connection.receive(within_s)
    if message.type is not aiohttp.WSMsgType.BINARY:
        raise AwayError(f"the connection has ended (code {connection.close_code})")
    with contextlib.suppress(ValueError):
        return wire.to_outcome(wire.unpack(message.data))
    raise AwayError("its answer is none")
