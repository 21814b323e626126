"""Rollouts from SGLang servers over HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from megatron_gspo.calls import MOST_BYTES, refusal
from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import ConfigError, DataError, EngineReplyError, EngineUnavailableError, RolloutError
from megatron_gspo.rollout.engine import Decode, Progress, Sampling
from megatron_gspo.rollout.sglang.reply import (
    generation_request,
    most_reply_bytes,
    new_request_id,
    parse_generation,
    shorten,
)
from megatron_gspo.types import OPEN, Prompt, Rollout, ServerAccess

T = TypeVar("T")

FIRST_PAUSE_S = 0.2
"""Pause before the first retry; it doubles with each."""


class SGLangEngine:
    """An ``Engine`` over one or more SGLang servers that hold the same weights.

    A prompt goes to the server with the fewest prompts in flight, all its samples together (they share the prompt's
    prefix), one request a sample so that each has its own seed. At most ``config.concurrency`` prompts are in flight.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: RolloutConfig,
        *,
        vocab_size: int,
        decode: Decode | None = None,
        access: ServerAccess = OPEN,
    ) -> None:
        if not urls:
            raise ConfigError("no rollout server: set rollout.servers, or leave it empty to start local ones")
        self._config = config
        self._vocab_size = vocab_size
        self._decode = decode
        self._access = access
        self._load = {url.rstrip("/"): 0 for url in urls}
        self.version = ""
        self.repeatable = False

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the semaphore of rollout_groups is the limit
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_s),
            headers={"Accept-Encoding": "identity"}  # what is small on its way would be counted then
            | ({"Authorization": f"Bearer {self._access.key}"} if self._access.key else {}),
            auto_decompress=False,
        )
        try:
            infos = await _gather(self._info(url) for url in self._load)
        except BaseException:
            await self._session.close()
            raise
        self.version = ", ".join(sorted({str(info.get("version", "unknown")) for info in infos}))
        self.repeatable = all(info.get("enable_deterministic_inference") is True for info in infos)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._session.close()

    async def rollout_groups(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, weight_version: int, progress: Progress | None = None
    ) -> list[list[Rollout]]:
        """See ``Engine.rollout_groups``. Also raises ConfigError for seeds that the servers would ignore."""
        if sampling.seed is not None and not self.repeatable:
            raise ConfigError(
                f"repeatable rollouts need servers started with --enable-deterministic-inference, and one of "
                f"{', '.join(self._load)} was not: restart it, or set rollout.seeded = false"
            )
        for prompt in prompts:
            check_prompt(prompt, self._vocab_size)
        slots = asyncio.Semaphore(self._config.concurrency)

        async def group(prompt: Prompt) -> list[Rollout]:
            async with slots:
                url = min(self._load, key=self._load.__getitem__)
                self._load[url] += 1
                try:
                    samples = range(sampling.group_size)
                    rollouts = await _gather(self._rollout(url, prompt, i, sampling, weight_version) for i in samples)
                finally:
                    self._load[url] -= 1
            if progress is not None:
                progress(rollouts)
            return rollouts

        return await _gather(group(prompt) for prompt in prompts)

    async def _rollout(self, url: str, prompt: Prompt, sample: int, sampling: Sampling, weight_version: int) -> Rollout:
        """One response; an abort is drawn again with the same seed, and returned when it persists."""
        request = generation_request(prompt, sample, sampling)
        for attempt in range(self._config.retries + 1):
            await _pause(attempt)
            reply = await self._call("POST", url, "/generate", request, most_bytes=most_reply_bytes(prompt, sampling))
            try:
                rollout = parse_generation(
                    reply,
                    prompt,
                    sample,
                    sampling,
                    vocab_size=self._vocab_size,
                    weight_version=weight_version,
                    request_id=request["rid"],
                    decode=self._decode,
                    access=self._access,
                )
            except EngineReplyError as error:
                raise EngineReplyError(f"{url}: {error}") from None
            if rollout.finish_reason != "abort":
                break
        return rollout

    async def _info(self, url: str) -> dict[str, Any]:
        info = await self._call("GET", url, "/server_info")
        if not isinstance(info, dict):
            raise EngineReplyError(f"{url}/server_info is no object of settings, so no SGLang server: {shorten(info)}")
        return info

    async def _call(
        self, method: str, url: str, path: str, body: dict[str, Any] | None = None, most_bytes: int = MOST_BYTES
    ) -> Any:
        """The decoded JSON of a 200 answer. Connection failures and 5xx answers are tried again, and nothing else:
        a request that was refused would be refused again, one that timed out may still be running.

        ``body`` is sent under an id of its own, which its ``rid`` holds afterwards. A redirect is refused: whoever
        answers at another address is not the server that was named.
        """
        for attempt in range(self._config.retries + 1):
            await _pause(attempt)
            if body is not None:
                body["rid"] = new_request_id()  # the server may still be at the one that failed
            try:
                async with self._session.request(method, url + path, json=body, allow_redirects=False) as response:
                    status, text = response.status, await _read(response, most_bytes)
            except TimeoutError:
                raise EngineUnavailableError(
                    f"{url}{path} did not answer within rollout.timeout_s = {self._config.timeout_s:g} s"
                ) from None
            except aiohttp.ClientError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if status < 500:
                return _decode_answer(status, text, url + path)
            failure = f"HTTP {status}: {shorten(text)}"
        raise EngineUnavailableError(f"{url}{path} failed {self._config.retries + 1} times, at last with {failure}")


def check_prompt(prompt: Prompt, vocab_size: int) -> None:
    """Raises DataError for a prompt that would crash the server (an id outside its embedding does)."""
    if not prompt.token_ids:
        raise DataError(f"prompt {prompt.id!r} has no tokens")
    outside = [token for token in prompt.token_ids if not 0 <= token < vocab_size]
    if outside:
        raise DataError(
            f"prompt {prompt.id!r} holds token {outside[0]}, outside the model's vocabulary of {vocab_size}: "
            f"the tokenizer is not this model's"
        )


def _decode_answer(status: int, text: str, url: str) -> Any:
    if status != 200:
        raise RolloutError(f"{url} refused the request ({refusal(status)}): {_message(text)}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EngineReplyError(f"{url} answered with broken JSON ({error}): {shorten(text)}") from None


def _message(text: str) -> str:
    """SGLang's own words, when the body is its error object."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return shorten(text)


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> str:
    """The body. Raises EngineReplyError for one of more than ``most_bytes``, as soon as they have come."""
    body = bytearray()
    async for part in response.content.iter_any():
        body += part
        if len(body) > most_bytes:
            raise EngineReplyError(
                f"{response.url}: the reply goes on after {most_bytes} bytes, the most that what was asked for can take"
            )
    return body.decode(errors="replace")


async def _pause(attempt: int) -> None:
    if attempt:
        await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))


async def _gather(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Every result, in order. The first failure cancels the rest and is raised as itself, not in a group."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
