"""Programs on a SandboxFusion server: ``POST /run_code``, as its ``sandbox/server/sandbox_api.py`` has it.

A request is one input: it compiles each time, and ``go_on`` saves the requests after it. It has limits of time and
memory, and none of processor time, processes and files; output is cut at ``Limits.output_bytes`` here, and at a
mebibyte there. What is no text cannot be sent, and comes back as a word of that server's.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import aiohttp

from megatron_gspo.sandbox.checks import checked
from megatron_gspo.sandbox.interface import MIB, Limits, Outcome, Program, Verdict
from megatron_gspo.sandbox.languages import COMPILE, LANGUAGES
from megatron_gspo.sandbox.local import failed, in_order
from megatron_gspo.sandbox.remote import AGAIN, AwayError, Lent

QUEUE_S = 120.0
"""Seconds that a request may wait at the server, beyond its limits."""
Json = Mapping[str, Any]


class FusionSandbox(Lent):
    """A ``Sandbox`` that SandboxFusion servers lend."""

    async def run(
        self,
        program: Program,
        inputs: Sequence[bytes],
        limits: Limits,
        *,
        go_on: Callable[[int, Outcome], bool] | None = None,
    ) -> list[Outcome]:
        """As a ``Sandbox`` has it."""
        _, refused = checked(program)
        if refused is not None:
            return [refused]

        def further(index: int, outcome: Outcome) -> bool:
            compiles = outcome.verdict is not Verdict.COMPILE
            return compiles and (go_on is None or go_on(index, outcome))

        async with self._servers.turn():
            return await in_order(lambda given: self._one(program, given, limits), inputs, further)

    async def _one(self, program: Program, given: bytes, limits: Limits) -> Outcome:
        try:
            body = _request(program, given, limits)
        except UnicodeDecodeError as error:
            return failed(error)

        async def post(url: str) -> Outcome:
            total = COMPILE.wall_s + limits.wall_s + QUEUE_S
            async with self._servers.http.post(
                f"{url}/run_code", json=body, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=total)
            ) as reply:
                if reply.status in AGAIN:
                    raise AwayError(f"HTTP {reply.status}")
                if reply.status != 200:
                    return failed(AwayError(f"{url}/run_code: HTTP {reply.status}"))
                return outcome_of(json.loads(await reply.read()), limits, LANGUAGES[program.language].out_of_memory)

        try:
            return await self._servers.ask(post)
        except (ValueError, KeyError, TypeError) as error:
            return failed(ValueError(f"an answer that is none of SandboxFusion's: {type(error).__name__}: {error}"))


def _request(program: Program, given: bytes, limits: Limits) -> Json:
    return {
        "code": program.source,
        "language": program.language,
        "stdin": given.decode(),
        "compile_timeout": COMPILE.wall_s,
        "run_timeout": limits.wall_s,
        "memory_limit_MB": -(-limits.memory_bytes // MIB),
        "files": {name: base64.b64encode(content).decode() for name, content in program.files.items()},
        "fetch_files": [],
    }


def outcome_of(reply: Json, limits: Limits, out_of_memory: bytes) -> Outcome:
    """An answer of ``/run_code`` as an outcome. Raises ValueError, KeyError or TypeError for what is none."""
    if reply["status"] == "SandboxError":
        return failed(AwayError(f"SandboxError: {reply['message']}"))
    compiled: Json | None = reply.get("compile_result")
    if compiled is not None and (compiled["status"] != "Finished" or compiled["return_code"] != 0):
        return Outcome(Verdict.COMPILE, None, b"", _bytes(compiled["stderr"]), float(compiled["execution_time"]), 0.0)
    run: Json = reply["run_result"]
    seconds, code = float(run["execution_time"]), run["return_code"]
    stdout, stderr = _bytes(run["stdout"]), _bytes(run["stderr"])
    status = None if code is None else int(code) if code >= 0 else 128 - int(code)
    most = limits.output_bytes
    if run["status"] == "TimeLimitExceeded":
        verdict, status = Verdict.TIME, None
    elif run["status"] != "Finished" or status is None:
        raise ValueError(f"run_result.status = {run['status']!r}, return_code = {code!r}")
    elif max(len(stdout), len(stderr)) > most:
        verdict, status = Verdict.OUTPUT, None
    elif status == 0:
        verdict = Verdict.OK
    else:
        verdict = Verdict.MEMORY if out_of_memory in stderr else Verdict.CRASHED
    return Outcome(verdict, status, stdout[:most], stderr[:most], seconds, 0.0)


def _bytes(text: str | None) -> bytes:
    return (text or "").encode(errors="replace")
