"""The engine's control: SGLang's endpoints for weights and versions, called on all servers at once."""

from __future__ import annotations

import base64
import functools
import http.client
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from megatron_gspo.calls import OverlongReplyError, call, refusal, start
from megatron_gspo.errors import NoAnswerError, SyncError
from megatron_gspo.rollout.sglang.patience import DEAF
from megatron_gspo.types import is_of_another_run

TIMEOUT_S = 600.0
HEALTH_EVERY_S = 20.0
IDLE_S = 30
"""Seconds that a server may take to finish what it is doing before an update."""


class Servers:
    """``rollout.engine.Control`` of SGLang: calls to every server in parallel. A refusal or a dead server is a
    SyncError naming the URL.

    ``timeout_s`` bounds each call from its first to its last byte; ``key`` is sent with it. A server that is silent is
    asked every ``health_every_s`` whether anybody is there, and is given up when it takes ``DEAF`` such questions in a
    row without an answer of any kind.
    """

    def __init__(
        self, urls: Sequence[str], timeout_s: float = TIMEOUT_S, key: str = "", health_every_s: float = HEALTH_EVERY_S
    ) -> None:
        if not urls:
            raise SyncError("weight sync has no server to send to")
        self.urls = tuple(url.rstrip("/") for url in urls)
        self._timeout_s = timeout_s
        self._key = key
        self._health_every_s = health_every_s
        self._infos: list[dict[str, Any]] | None = None

    def post(self, path: str, body: dict[str, Any] | None = None) -> None:
        """POSTs the same JSON to every server; raises unless all succeed."""
        data = json.dumps(body or {}).encode()
        self._all(path, [data] * len(self.urls))

    def begin_update(self) -> None:
        """Opens an update session, which takes tensors until ``end_update``."""
        self.post("/begin_weight_update", {"selector": "all"})

    def end_update(self) -> None:
        """Closes the session."""
        self.post("/end_weight_update")

    def update_from_disk(self, directory: str) -> None:
        """Loads a Hugging Face directory that the servers can read."""
        # A server that started from no files ("--load-format dummy") would look for these weights in the same way.
        body = {"model_path": directory, "load_format": "auto", "flush_cache": True}
        self.post("/update_weights_from_disk", body)

    def join(self, group: str, address: str, port: int, world_size: int, backend: str) -> list[Future[str]]:
        """Begins to take every tensor-parallel rank of every server, from rank 1 on, into a group whose rank 0 keeps
        its store at (address, port)."""
        ranks = self.tensor_ranks()
        common = {"master_address": address, "master_port": port, "world_size": world_size, "group_name": group}
        bodies = [{**common, "rank_offset": 1 + sum(ranks[:index]), "backend": backend} for index in range(len(ranks))]
        return self.start("/init_weights_update_group", bodies)

    def receive(self, group: str, layout: Mapping[str, Any], patience_s: float) -> list[Future[str]]:
        """Begins to receive one flat bucket of tensors from the group's rank 0."""
        body = {**layout, "group_name": group, "load_format": "flattened_bucket", "flush_cache": False}
        return self.start("/update_weights_from_distributed", [body] * len(self.urls), patience_s=patience_s)

    def leave(self, group: str) -> list[Future[str]]:
        """Begins to take the servers out of a group."""
        return self.start("/destroy_weights_update_group", [{"group_name": group}] * len(self.urls))

    def overwrite(self) -> None:
        """Puts random numbers in the place of the weights."""
        self.post("/weights_checker", {"action": "reset_tensors"})

    def start(self, path: str, bodies: Sequence[dict[str, Any]], patience_s: float = 0.0) -> list[Future[str]]:
        """Begins to POST ``bodies[i]`` to server i; its answer, or its SyncError, comes later.

        ``patience_s``: seconds beyond the timeout, for a caller who has one of his own.
        """
        timeout_s = self._timeout_s + patience_s
        return [
            start(functools.partial(self._call, url + path, json.dumps(body).encode(), timeout_s))
            for url, body in zip(self.urls, bodies, strict=True)
        ]

    def post_tensors(self, payload: bytes) -> None:
        """One bucket (base64) in an open update session; each tensor-parallel rank of a server reads a copy.

        The JSON is put together from bytes: to encode a bucket as text takes longer than to send it.
        """
        bodies = {
            ranks: b'{"serialized_named_tensors": [%s], "flush_cache": false}' % b", ".join([b'"%s"' % payload] * ranks)
            for ranks in set(self.tensor_ranks())
        }
        self._all("/update_weights_from_tensor", [bodies[ranks] for ranks in self.tensor_ranks()])

    def post_handles(self, payloads: Sequence[Sequence[bytes]]) -> None:
        """One flat bucket in memory that servers open, in an open update session: ``payloads[server][tensor rank]``.

        Each rank opens its own alone. Raises SyncError unless every server has loaded it.
        """
        common = {"load_format": "flattened_bucket", "flush_cache": False}
        encoded = [[base64.b64encode(rank).decode() for rank in ranks] for ranks in payloads]
        bodies = [json.dumps({"serialized_named_tensors": ranks, **common}).encode() for ranks in encoded]
        self._all("/update_weights_from_tensor", bodies)

    def tensor_ranks(self) -> tuple[int, ...]:
        """Tensor-parallel ranks of each server."""
        return tuple(_ranks(url, info) for url, info in zip(self.urls, self.infos(), strict=True))

    def infos(self) -> list[dict[str, Any]]:
        """Each server's settings; asked once."""
        if self._infos is None:
            self._infos = self._get("/server_info")
        return self._infos

    def checksums(self) -> list[list[dict[str, str]]]:
        """Of each server and each of its tensor-parallel ranks: parameter -> hash of its bytes.

        Parameters are named and fused as the server has them.
        """
        texts = self._all("/weights_checker", [b'{"action": "checksum"}'] * len(self.urls))
        answers = [_object(f"{url}/weights_checker", text) for url, text in zip(self.urls, texts, strict=True)]
        return [[rank["checksums"] for rank in answer.get("ranks", [])] for answer in answers]

    def flush_when_idle(self) -> None:
        """Empties the prefix caches. A server that still generates after ``IDLE_S`` refuses, and so does this."""
        self.post(f"/flush_cache?timeout={IDLE_S}")

    def set_version(self, version: str) -> None:
        """Names the version of what they hold."""
        self.post("/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def pause(self) -> None:
        """Aborts what is being generated, and lets no request begin until ``unpause``: a question after the health
        generates too (SGLang 0.5.23, srt/entrypoints/http_server.py), and would kill a server that goes to sleep."""
        self.post("/pause_generation", {"mode": "abort"})

    def unpause(self) -> None:
        """Lets requests in again."""
        self.post("/continue_generation")

    def sleep(self, tags: Sequence[str]) -> None:
        """Gives device memory back, by ``tags``. A scheduler that is not idle, or sleeps already, dies of it."""
        self.post("/release_memory_occupation", {"tags": list(tags)})

    def wake(self, tags: Sequence[str]) -> None:
        """Takes the memory again. A scheduler that has not given it back dies of it."""
        self.post("/resume_memory_occupation", {"tags": list(tags)})

    def versions(self) -> list[str]:
        """What each server says of the version of what it holds."""
        return [str(info.get("weight_version")) for info in self._get("/model_info")]

    def check_version(self, version: str) -> None:
        """Raises SyncError unless every server reports ``version``."""
        reported = self.versions()
        wrong = [f"{url} {got!r}" for url, got in zip(self.urls, reported, strict=True) if got != version]
        if wrong:
            others = any(is_of_another_run(got, version) for got in reported)
            why = " (another run is using the server; give each run servers of its own)" if others else ""
            raise SyncError(f"servers do not hold weight version {version} after the sync: {', '.join(wrong)}{why}")

    def _get(self, path: str) -> list[dict[str, Any]]:
        texts = self._all(path, [None] * len(self.urls))
        return [_object(url + path, text) for url, text in zip(self.urls, texts, strict=True)]

    def _all(self, path: str, bodies: Sequence[bytes | None]) -> list[str]:
        with ThreadPoolExecutor(len(self.urls)) as pool:
            return list(pool.map(lambda url, body: self._call(url + path, body), self.urls, bodies))

    def _call(self, url: str, body: bytes | None, timeout_s: float | None = None) -> str:
        limit_s = timeout_s or self._timeout_s
        asked = start(lambda: call(url, body, key=self._key, timeout_s=limit_s))
        try:
            self._await(url, asked)
            reply = asked.result()
        except OverlongReplyError as error:
            raise SyncError(f"{url}: {error}") from None
        except (OSError, http.client.HTTPException) as error:
            raise NoAnswerError(f"{url} did not answer: {type(error).__name__}: {error}") from None
        text = reply.body.decode(errors="replace")
        if reply.status != 200:
            raise SyncError(f"{url} refused ({refusal(reply.status)}): {text[:500]}")
        if refused(text):
            raise SyncError(f"{url} refused (HTTP 200, success = false): {text[:500]}")
        return text

    def _await(self, url: str, asked: Future[Any]) -> None:
        """Until there is an answer, or a failure. Raises NoAnswerError where nobody is there any more: a machine that
        is gone, or a process that was stopped, closes no connection."""
        unheard, pause = 0, self._health_every_s
        while wait([asked], timeout=pause).not_done:
            begin = time.monotonic()
            unheard = 0 if self._hears(url) else unheard + 1
            if unheard == DEAF and not asked.done():
                raise NoAnswerError(
                    f"{url} did not answer, and nobody is there: {DEAF} questions in a row, {self._health_every_s:g} s "
                    f"apart (rollout.health_every_s), were not answered either"
                )
            pause = max(0.0, begin + self._health_every_s - time.monotonic())

    def _hears(self, url: str) -> bool:
        """Whether the server of ``url`` answers a question that its scheduler is not asked, in whatever way."""
        parts = urlsplit(url)
        try:
            call(f"{parts.scheme}://{parts.netloc}/model_info", key=self._key, timeout_s=self._health_every_s)
        except (OSError, http.client.HTTPException):
            return False
        return True


def refused(text: str) -> bool:
    """Whether an answer is an object that says ``"success": false``, as some do with status 200."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):  # "Cache flushed."
        return False
    return isinstance(answer, dict) and answer.get("success", True) is not True


def _object(url: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SyncError(f"{url} answered with broken JSON ({error}): {text[:200]!r}") from None
    if not isinstance(value, dict):
        raise SyncError(f"{url} answered with no object of settings: {text[:200]!r}")
    return value


def _ranks(url: str, info: dict[str, Any]) -> int:
    """Tensor-parallel ranks of a server, from its ``/server_info``."""
    ranks = info.get("tp_size")
    if type(ranks) is not int or ranks < 1:
        raise SyncError(f"{url}/server_info says tp_size = {ranks!r:.80}, which is no number of ranks")
    return ranks
