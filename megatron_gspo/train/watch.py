"""Looking at rollout servers between draws: which answer, with which weights, and which are started again."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from http.client import HTTPException
from typing import Protocol

from megatron_gspo.calls import call, start
from megatron_gspo.errors import ConfigError
from megatron_gspo.rollout.sglang.probe import get, probe
from megatron_gspo.train.fleet import Sight

ANSWER_S = 10.0
"""Seconds for a question that no scheduler is asked."""
GENERATE_S = 30.0
"""Seconds in which a server that was given up must generate a token (SGLang takes 20 to say that it cannot)."""
PROMPT_S = 3.0
"""Seconds that a look waits for it; what takes longer is seen by a later one."""


class Local(Protocol):
    """Servers that this run has started (``rollout.sglang.launcher.LocalServers``)."""

    def mend(self, silent: Collection[str]) -> Mapping[str, str]:
        """Starts those again that have died or are ``silent``, without waiting. URL -> why, of all that cannot be asked
        now."""
        ...

    restarts: int
    """How often one was started again so far."""
    said: list[str]
    """What there is to say of it."""


class Watchman:
    """``train.fleet.Watch`` over HTTP.

    ``unfit`` says of a server that comes back why it is not the one that was there, or "".
    """

    def __init__(
        self,
        urls: Sequence[str],
        key: str = "",
        run: str = "",
        *,
        local: Local | None = None,
        router: str = "",
        unfit: Callable[[str], str] = lambda url: "",
    ) -> None:
        self._urls = tuple(url.rstrip("/") for url in urls)
        self._key, self._run, self._router = key, run, router.rstrip("/")
        self._local, self._unfit = local, unfit
        self._asked: dict[str, Future[str]] = {}
        self._known: set[str] = set(self._urls)
        """Servers whose model was looked at since they were last away."""

    def look(self, version: str, suspects: Collection[str]) -> Sight:
        """See ``Watch.look``."""
        silent, unknown = self._unproven(suspects)
        before = self._local.restarts if self._local is not None else 0
        gone = dict(self._local.mend(silent)) if self._local is not None else {}
        gone = silent | unknown | gone
        held: dict[str, str | None] = {}
        for state in probe([url for url in self._urls if url not in gone], ANSWER_S, self._key, health=False):
            if state.error is not None:
                gone[state.url] = f"{state.url}: {state.error}"
            else:
                held[state.url] = state.weight_version
        self._known -= gone.keys()
        for url in [url for url in held if url not in self._known or held[url] != version]:
            if why := self._unfit(url):
                gone[url] = why
                del held[url]
        self._known = set(held)
        return Sight(
            holding=tuple(url for url in held if held[url] == version),
            empty=tuple(url for url in held if held[url] != version),
            gone=gone,
            notes=self._said(),
            restarted=self._local.restarts - before if self._local is not None else 0,
            router=self._router_problem(),
        )

    def gone(self, urls: Sequence[str]) -> dict[str, str]:
        """See ``Watch.gone``."""
        states = probe([url for url in self._urls if url in urls], ANSWER_S, self._key, health=False)
        gone = {state.url: f"{state.url}: {state.error}" for state in states if state.error is not None}
        for state in states:
            if state.error is None and self._run not in str(state.weight_version):
                gone[state.url] = f"{state.url} was started again: it holds weights of version {state.weight_version}"
        return gone

    def _unproven(self, suspects: Collection[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Of servers that were given up, URL -> why: those that do not generate, and those of which nobody knows yet.
        They are asked in the background: one that hangs holds up nobody."""
        silent, unknown = {}, {}
        for url in suspects:
            if url not in self._asked:
                self._asked[url] = start(functools.partial(generation_problem, url, self._key))
        wait([self._asked[url] for url in suspects], timeout=PROMPT_S)
        for url in suspects:
            if not self._asked[url].done():
                unknown[url] = f"{url} does not say yet whether it generates"
            elif why := self._asked.pop(url).result():
                silent[url] = why
        return silent, unknown

    def _said(self) -> tuple[str, ...]:
        if self._local is None:
            return ()
        said = tuple(self._local.said)
        self._local.said.clear()
        return said

    def _router_problem(self) -> str:
        if not self._router:
            return ""
        try:
            get(f"{self._router}/health", ANSWER_S)
        except (OSError, HTTPException) as error:
            return f"rollout.router = {self._router}: {error or type(error).__name__}"
        return ""


def generation_problem(url: str, key: str) -> str:
    """Why a server cannot generate, "" when it can. What it is still at is ended: nobody waits for it any more."""
    with contextlib.suppress(OSError, HTTPException):
        call(f"{url}/abort_request", b'{"rid": "", "abort_all": true}', key=key, timeout_s=ANSWER_S)
    try:
        get(f"{url}/health_generate", GENERATE_S, key)
    except (OSError, HTTPException) as error:
        return f"{url} generates nothing: {error or type(error).__name__}"
    return ""


def is_deterministic(url: str, key: str) -> bool:
    """Whether a server says that equal seeds give equal tokens."""
    try:
        info = json.loads(get(f"{url}/server_info", ANSWER_S, key))
    except (OSError, ValueError, HTTPException):
        return False
    return isinstance(info, dict) and info.get("enable_deterministic_inference") is True


def another_server(check: Callable[[], None], *, seeded: bool, url: str, key: str) -> str:
    """Why a server that has come back is not the one that was there; "" when it is. ``check`` raises ConfigError."""
    try:
        check()
    except ConfigError as error:
        return str(error)
    if seeded and not is_deterministic(url, key):
        return f"{url} was started again without --enable-deterministic-inference"
    return ""
