"""Rollouts from SGLang servers over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import aiohttp

from megatron_gspo.calls import MOST_BYTES
from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import (
    ConfigError,
    DataError,
    EngineReplyError,
    EngineUnavailableError,
    NoServerError,
    StaleWeightsError,
)
from megatron_gspo.rollout.desk import Desk
from megatron_gspo.rollout.dispatch import Dispatcher, planned
from megatron_gspo.rollout.engine import Decode, Progress, Sampling
from megatron_gspo.rollout.sglang.answers import decode_answer, read_body
from megatron_gspo.rollout.sglang.patience import DEAF, Patience
from megatron_gspo.rollout.sglang.reply import (
    alone,
    generation_request,
    in_parts,
    most_reply_bytes,
    new_request_id,
    parse_generation,
    shorten,
)
from megatron_gspo.rollout.tasks import first_result, gather
from megatron_gspo.types import OPEN, Prompt, Rollout, ServerAccess

FIRST_PAUSE_S = 0.2
"""Pause before the first retry; it doubles with each."""
RESPONSES_A_SERVER = 512
"""In flight by default: what a server runs at once, and a queue from which it takes the next without waiting for us."""
BROKEN = (aiohttp.ClientError, EngineReplyError, ValueError, RecursionError)
"""What comes of asking a server that is gone, or is none."""
ABORT_S = 5.0
"""Seconds for asking a server to end requests."""
WORK = ("num_used_tokens", "total_prefill_uncached_tokens", "decode_moments", "num_running_reqs", "num_waiting_reqs")
"""Of ``/v1/loads`` (SGLang 0.5.23), what changes when a server works."""


@dataclass
class _Place:
    """Where a prompt is: which server it is to have, which it has."""

    wish: str = ""
    avoid: frozenset[str] = frozenset()
    once: bool = False
    """Whether it is given up with its first server."""
    url: str = ""
    sent: asyncio.Event = field(default_factory=asyncio.Event)
    """Whether it has had one."""


class SGLangEngine:
    """An ``Engine`` over SGLang servers that hold the same weights, or over a router in front of them.

    A prompt's samples go to one server, together in one request in which each has a seed of its own. A server that is
    gone, silent for too long, or without this run's weights gets nothing more (``lost``), and its prompts go to others.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: RolloutConfig,
        *,
        vocab_size: int,
        decode: Decode | None = None,
        access: ServerAccess = OPEN,
        leaders: int = 1,
    ) -> None:
        if not urls:
            raise ConfigError("no rollout server: set rollout.servers, or leave it empty to start local ones")
        self._config = config
        self._vocab_size = vocab_size
        self._decode = decode
        self._access = access
        self._leaders = leaders
        self._router = config.router.rstrip("/")
        self._patience: dict[str, Patience] = {}
        self._infos: dict[str, dict[str, Any]] = {}
        self.lost: dict[str, str] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self.version = ""
        self.serve(urls)

    def serve(self, urls: Sequence[str]) -> None:
        """See ``Engine.serve``."""
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._infos = {url: info for url, info in self._infos.items() if url in self._urls and url not in self.lost}
        self.lost = {}
        self.moved = self.resubmitted = 0

    @property
    def repeatable(self) -> bool:
        """See ``Engine.repeatable``."""
        return bool(self._infos) and all(
            info.get("enable_deterministic_inference") is True for info in self._infos.values()
        )

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the desk's slots are the limit
            headers={"Accept-Encoding": "identity"}  # what is small on its way would be counted then
            | ({"Authorization": f"Bearer {self._access.key}"} if self._access.key else {}),
            auto_decompress=False,
        )
        try:
            await gather(self._meet(url) for url in self._urls if url not in self._infos)
            if len(self.lost) == len(self._urls):
                raise NoServerError("; ".join(self.lost.values()))
        except BaseException:
            await self._session.close()
            raise
        self.version = ", ".join(sorted({str(info.get("version", "unknown")) for info in self._infos.values()}))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._aborts:
            await asyncio.wait(self._aborts, timeout=ABORT_S)
        await self._session.close()

    async def rollout_groups(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        weight_version: int,
        progress: Progress | None = None,
        first: int = 0,
    ) -> list[list[Rollout]]:
        """See ``Engine.rollout_groups``. Also raises ConfigError for seeds that the servers would ignore."""
        if sampling.seed is not None and not self.repeatable:
            raise ConfigError(
                f"repeatable rollouts need servers started with --enable-deterministic-inference, and one of "
                f"{', '.join(self._urls)} was not: restart it, or set rollout.seeded = false"
            )
        for prompt in prompts:
            check_prompt(prompt, self._vocab_size)
        desk = self._open_desk(sampling.group_size)

        async def group(prompt: Prompt, wish: str) -> list[Rollout]:
            rollouts = await self._first_answer(desk, prompt, wish, sampling, weight_version)
            if progress is not None:
                progress(rollouts)
            return rollouts

        wishes = planned(len(prompts), desk.up, first)
        return await gather(group(prompt, wish) for prompt, wish in zip(prompts, wishes, strict=True))

    def _open_desk(self, group_size: int) -> Desk:
        """A router is one server, whose slots are those of all that are behind it."""
        answering = [url for url in self._urls if url not in self.lost]
        slots = -(-RESPONSES_A_SERVER // (group_size * self._leaders))
        if self._router:
            slots *= max(1, len(answering))
        limit = self._config.concurrency
        dispatcher = Dispatcher(limit=limit) if limit else Dispatcher(slots=slots)
        return Desk(dispatcher, [self._router] if self._router else answering, self.lost)

    async def _first_answer(
        self, desk: Desk, prompt: Prompt, wish: str, sampling: Sampling, weight_version: int
    ) -> list[Rollout]:
        """A prompt's responses, from another server too where the first one takes longer than is waited for."""
        answer = functools.partial(self._from_any, desk, prompt, sampling, weight_version)
        place = _Place(wish)
        after = self._config.resubmit_after_s
        if after is None:
            return await answer(place)
        first, sent = asyncio.create_task(answer(place)), asyncio.create_task(place.sent.wait())
        tasks = [first]
        try:
            either: list[asyncio.Future[Any]] = [first, sent]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait([first], timeout=after)
            if not first.done() and set(desk.up) - {place.url}:
                self.resubmitted += 1
                tasks.append(asyncio.create_task(answer(_Place(avoid=frozenset([place.url]), once=True))))
            return await first_result(tasks)
        finally:
            for task in (*tasks, sent):
                task.cancel()
            await asyncio.wait(tasks)

    async def _from_any(
        self, desk: Desk, prompt: Prompt, sampling: Sampling, weight_version: int, place: _Place
    ) -> list[Rollout]:
        """A prompt's responses from one server after another, until one gives them. Raises NoServerError when none is
        left."""
        while True:
            async with desk.server(prompt.id, wish=place.wish, avoid=place.avoid) as place.url:
                place.sent.set()
                try:
                    return await self._group(place.url, prompt, sampling, weight_version)
                except (EngineUnavailableError, StaleWeightsError) as error:
                    if self._config.on_server_loss == "error":
                        raise
                    desk.lose(place.url, str(error))
                    if place.once:
                        raise
            self.moved += bool(desk.up)

    async def _group(self, url: str, prompt: Prompt, sampling: Sampling, weight_version: int) -> list[Rollout]:
        """A prompt's responses; aborted ones are drawn again with the same seeds, and returned when that persists."""
        group: dict[int, Rollout] = {}
        for attempt in range(self._config.retries + 1):
            left = [i for i in range(sampling.group_size) if i not in group or group[i].finish_reason == "abort"]
            if not left:
                break
            await _pause(attempt)
            parts = [[i] for i in left] if url == self._router else in_parts(left, prompt, sampling)
            drawn = await gather(self._draw(url, prompt, part, sampling, weight_version) for part in parts)
            group |= {rollout.sample: rollout for rollouts in drawn for rollout in rollouts}
        return [group[i] for i in range(sampling.group_size)]

    async def _draw(
        self, url: str, prompt: Prompt, samples: Sequence[int], sampling: Sampling, weight_version: int
    ) -> list[Rollout]:
        """Some of a prompt's responses, in one request."""
        request = generation_request(prompt, samples, sampling)
        if url == self._router:
            request = alone(request)
        most_bytes = most_reply_bytes(prompt, len(samples), sampling)
        replies = await self._call("POST", url, "/generate", request, most_bytes=most_bytes)
        if url == self._router:
            replies = [replies]
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
                for reply, sample, request_id in zip(replies, samples, _ids(request), strict=True)
            ]
        except EngineReplyError as error:
            raise type(error)(f"{url}: {error}") from None

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
                together = isinstance(body["input_ids"][0], list)
                body["rid"] = [new_request_id() for _ in body["input_ids"]] if together else new_request_id()
            try:
                async with self._patience_with(url).wait() if body is not None else contextlib.nullcontext():
                    status, text = await self._send(method, url + path, body, most_bytes)
            except TimeoutError:
                raise EngineUnavailableError(f"{url}{path} {self._silence(url, asked=body is None)}") from None
            except asyncio.CancelledError:
                if body is not None:
                    self._abort(url, _ids(body))
                raise
            except aiohttp.ClientError as error:
                failure = f"{type(error).__name__}: {error}"
                continue
            if status < 500:
                return decode_answer(status, text, url + path)
            failure = f"HTTP {status}: {shorten(text)}"
        raise EngineUnavailableError(f"{url}{path} failed {self._config.retries + 1} times, at last with {failure}")

    async def _send(self, method: str, url: str, body: dict[str, Any] | None, most_bytes: int) -> tuple[int, str]:
        """One request: the answer's status and text. One with a body is under the server's ``Patience``."""
        timeout = aiohttp.ClientTimeout(total=self._config.timeout_s if body is None else None)
        options: dict[str, Any] = {"json": body, "allow_redirects": False, "timeout": timeout}
        async with self._session.request(method, url, **options) as response:
            return response.status, await read_body(response, most_bytes)

    def _patience_with(self, url: str) -> Patience:
        if url not in self._patience:
            work, hears = functools.partial(self._work, url), functools.partial(self._hears, url)
            self._patience[url] = Patience(self._config.timeout_s, work, hears, self._config.health_every_s)
        return self._patience[url]

    def _silence(self, url: str, *, asked: bool) -> str:
        if not asked and self._patience_with(url).deaf:
            every_s = self._config.health_every_s
            return f"takes no request: {DEAF} in a row were not answered in {every_s:g} s (rollout.health_every_s)"
        silent = "" if asked else ", answered no other request, and generated nothing"
        return f"did not answer within rollout.timeout_s = {self._config.timeout_s:g} s{silent}"

    async def _work(self, url: str) -> object:
        """What a server, or all behind the router, has done so far, in tokens and requests; None when one does not
        say."""
        done = []
        for each in self._urls if url == self._router else (url,):
            try:
                status, text = await self._send("GET", f"{each}/v1/loads?include=core", None, MOST_BYTES)
                loads = json.loads(text)["loads"] if status == 200 else None
                done += [None if loads is None else [[load.get(name) for name in WORK] for load in loads]]
            except (*BROKEN, KeyError, TypeError, AttributeError):
                done += [None]
        return None if all(each is None for each in done) else done

    async def _hears(self, url: str) -> bool:
        """Whether whoever is there answers anything at all. (A server that is busy does: no scheduler is asked.)"""
        with contextlib.suppress(aiohttp.ClientError, EngineReplyError, TimeoutError):
            async with asyncio.timeout(self._config.health_every_s):
                await self._send("GET", f"{url}/model_info", None, MOST_BYTES)
                return True
        return False

    async def _meet(self, url: str) -> None:
        """Asks a server for its settings. One that is gone is lost, unless that ends the run."""
        try:
            self._infos[url] = await self._info(url)
        except EngineUnavailableError as error:
            if self._config.on_server_loss == "error":
                raise
            self.lost[url] = str(error)

    def _abort(self, url: str, request_ids: Sequence[str]) -> None:
        """Has a server, or all behind a router, end what nobody waits for any more, in the background."""

        async def ask() -> None:
            with contextlib.suppress(aiohttp.ClientError, EngineReplyError, TimeoutError):
                async with asyncio.timeout(ABORT_S):
                    for each in self._urls if url == self._router else (url,):
                        for request_id in request_ids:
                            await self._send("POST", f"{each}/abort_request", {"rid": request_id}, MOST_BYTES)

        task = asyncio.create_task(ask())
        self._aborts.add(task)
        task.add_done_callback(self._aborts.discard)


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


def _ids(request: dict[str, Any]) -> list[str]:
    return request["rid"] if isinstance(request["rid"], list) else [request["rid"]]


async def _pause(attempt: int) -> None:
    if attempt:
        await asyncio.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
