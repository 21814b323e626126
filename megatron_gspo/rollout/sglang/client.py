"""Rollouts from SGLang servers over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp

from megatron_gspo.calls import MOST_BYTES, refusal
from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import ConfigError, DataError, EngineReplyError, EngineUnavailableError, RolloutError
from megatron_gspo.rollout.engine import Decode, Progress, Sampling
from megatron_gspo.rollout.sglang.patience import Patience
from megatron_gspo.rollout.sglang.reply import (
    generation_request,
    in_parts,
    most_reply_bytes,
    new_request_id,
    parse_generation,
    shorten,
)
from megatron_gspo.types import OPEN, Prompt, Rollout, ServerAccess

T = TypeVar("T")

FIRST_PAUSE_S = 0.2
"""Pause before the first retry; it doubles with each."""
RESPONSES_A_SERVER = 512
"""In flight by default: what a server runs at once, and a queue from which it takes the next without waiting for us."""
WORK = ("num_used_tokens", "total_prefill_uncached_tokens", "decode_moments", "num_running_reqs", "num_waiting_reqs")
"""Of ``/v1/loads`` (SGLang 0.5.23), what changes when a server works."""


class SGLangEngine:
    """An ``Engine`` over one or more SGLang servers that hold the same weights.

    A prompt goes to the server with the fewest prompts in flight, all its samples together in one request, in which
    each has a seed of its own. At most ``config.concurrency`` prompts are in flight.
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
        self._patience = {url: Patience(config.timeout_s, functools.partial(self._work, url)) for url in self._load}
        self.version = ""
        self.repeatable = False

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the semaphore of rollout_groups is the limit
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
        fitting = -(-RESPONSES_A_SERVER * len(self._load) // sampling.group_size)
        slots = asyncio.Semaphore(self._config.concurrency or fitting)

        async def group(prompt: Prompt) -> list[Rollout]:
            async with slots:
                url = min(self._load, key=self._load.__getitem__)
                self._load[url] += 1
                try:
                    rollouts = await self._group(url, prompt, sampling, weight_version)
                finally:
                    self._load[url] -= 1
            if progress is not None:
                progress(rollouts)
            return rollouts

        return await _gather(group(prompt) for prompt in prompts)

    async def _group(self, url: str, prompt: Prompt, sampling: Sampling, weight_version: int) -> list[Rollout]:
        """A prompt's responses; aborted ones are drawn again with the same seeds, and returned when that persists."""
        group: dict[int, Rollout] = {}
        for attempt in range(self._config.retries + 1):
            left = [i for i in range(sampling.group_size) if i not in group or group[i].finish_reason == "abort"]
            if not left:
                break
            await _pause(attempt)
            parts = in_parts(left, prompt, sampling)
            drawn = await _gather(self._draw(url, prompt, part, sampling, weight_version) for part in parts)
            group |= {rollout.sample: rollout for rollouts in drawn for rollout in rollouts}
        return [group[i] for i in range(sampling.group_size)]

    async def _draw(
        self, url: str, prompt: Prompt, samples: Sequence[int], sampling: Sampling, weight_version: int
    ) -> list[Rollout]:
        """Some of a prompt's responses, in one request."""
        request = generation_request(prompt, samples, sampling)
        most_bytes = most_reply_bytes(prompt, len(samples), sampling)
        replies = await self._call("POST", url, "/generate", request, most_bytes=most_bytes)
        if not isinstance(replies, list) or len(replies) != len(samples):
            raise EngineReplyError(f"{url}: {len(samples)} responses were asked for, and it sent {shorten(replies)}")
        try:
            return [
                parse_generation(
                    reply,
                    prompt,
                    sample,
                    sampling,
                    vocab_size=self._vocab_size,
                    weight_version=weight_version,
                    request_id=request_id,
                    decode=self._decode,
                    access=self._access,
                )
                for reply, sample, request_id in zip(replies, samples, request["rid"], strict=True)
            ]
        except EngineReplyError as error:
            raise EngineReplyError(f"{url}: {error}") from None

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

        ``body`` is sent under ids of its own, which its ``rid`` holds afterwards. A redirect is refused: whoever
        answers at another address is not the server that was named.
        """
        for attempt in range(self._config.retries + 1):
            await _pause(attempt)
            if body is not None:
                # New ones: the server may still be at those of the one that failed.
                body["rid"] = [new_request_id() for _ in body["input_ids"]]
            try:
                async with self._patience[url].wait() if body is not None else contextlib.nullcontext():
                    status, text = await self._send(method, url + path, body, most_bytes)
            except TimeoutError:
                silent = "" if body is None else ", answered no other request, and generated nothing"
                raise EngineUnavailableError(
                    f"{url}{path} did not answer within rollout.timeout_s = {self._config.timeout_s:g} s{silent}"
                ) from None
            except aiohttp.ClientError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if status < 500:
                return _decode_answer(status, text, url + path)
            failure = f"HTTP {status}: {shorten(text)}"
        raise EngineUnavailableError(f"{url}{path} failed {self._config.retries + 1} times, at last with {failure}")

    async def _send(self, method: str, url: str, body: dict[str, Any] | None, most_bytes: int) -> tuple[int, str]:
        """One request: the answer's status and text. One with a body is under the server's ``Patience``."""
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s if body is None else None)
        options: dict[str, Any] = {"json": body, "allow_redirects": False, "timeout": timeout}
        async with self._session.request(method, url, **options) as response:
            return response.status, await _read(response, most_bytes)

    async def _work(self, url: str) -> object:
        """What a server has done so far, in tokens and requests; None when it does not say."""
        try:
            status, text = await self._send("GET", f"{url}/v1/loads?include=core", None, MOST_BYTES)
            return [[load.get(name) for name in WORK] for load in json.loads(text)["loads"]] if status == 200 else None
        except (aiohttp.ClientError, EngineReplyError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
            return None


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
