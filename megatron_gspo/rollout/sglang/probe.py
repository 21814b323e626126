"""What a rollout server says of itself, asked without an engine and without waiting long."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gspo.calls import call, refusal, server_key

KEY_FILE = "key"
"""Beside the logs of servers that a run has started, as long as they run."""


@dataclass(frozen=True)
class ServerState:
    """One server, now."""

    url: str
    error: str | None = None
    """Why it could not be asked; None when it answered, and then it is healthy."""
    model_path: str | None = None
    """The directory of its weights, as the server names it."""
    weight_version: str | None = None
    """What the last weight sync named them; "default" on a server that was started without a version."""
    started_from: str | None = None
    """The directory of the model that it was started with; on another machine, as the server names it."""


class RefusedError(OSError):
    """An answer that is not 200."""


def started_from(info: Mapping[str, Any]) -> str:
    """The directory of the model that a server was started with, by its ``/model_info``.

    A sync through files puts theirs in ``model_path``, and they are gone afterwards; ``tokenizer_path`` stays.
    """
    paths = [str(info[name]) for name in ("model_path", "tokenizer_path") if info.get(name)]
    return next((path for path in paths if (Path(path) / "config.json").is_file()), (paths or [""])[0])


def probe(urls: Sequence[str], timeout_s: float = 2.0, key: str = "", *, health: bool = True) -> list[ServerState]:
    """Asks each server for ``/health`` (unless it may be one that generates, and the server sleeps) and
    ``/model_info``, all at a time, ``timeout_s`` seconds per request."""
    if not urls:
        return []
    with ThreadPoolExecutor(len(urls)) as threads:
        return list(threads.map(lambda url: _probe(url.rstrip("/"), timeout_s, key, health), urls))


def _probe(url: str, timeout_s: float, key: str, health: bool) -> ServerState:
    try:
        if health:
            get(f"{url}/health", timeout_s)
        info: Any = json.loads(get(f"{url}/model_info", timeout_s, key))
        return ServerState(url, None, str(info["model_path"]), str(info["weight_version"]), started_from(info))
    except OSError as error:
        return ServerState(url, "no answer in time" if isinstance(error, TimeoutError) else str(error))
    except (ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        return ServerState(url, f"not a reply of /model_info ({type(error).__name__}: {error})")


def quantization_of(url: str, timeout_s: float, key: str = "") -> str | None:
    """What a server was told to make of its weights (``--quantization``); None where it was told nothing, or does not
    say. (It waits for the server's scheduler, as ``/model_info`` does not.)"""
    try:
        info = json.loads(get(f"{url}/server_info", timeout_s, key))
    except (OSError, ValueError, http.client.HTTPException):
        return None
    named = info.get("quantization") if isinstance(info, dict) else None
    return named if isinstance(named, str) else None


def find_key(logs: Path) -> str:
    """The key of the servers whose logs lie there, else that of the environment; "" for neither, or another user's."""
    with contextlib.suppress(OSError):
        return (logs / KEY_FILE).read_text()
    return server_key()


def get(url: str, timeout_s: float, key: str = "") -> bytes:
    """A page of a server. Raises OSError (RefusedError is one), HTTPException or ValueError."""
    reply = call(url, key=key, timeout_s=timeout_s)
    if reply.status != 200:
        raise RefusedError(refusal(reply.status))
    return reply.body
