"""What a rollout server says of itself, asked without an engine and without waiting long."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

MOST_BYTES = 16 * 2**20
"""Of a reply that is read; a status page has some thousand."""
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the engine's client uses no proxy either


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


def probe(urls: Sequence[str], timeout_s: float = 2.0) -> list[ServerState]:
    """Asks each server for ``/health`` and ``/model_info``, all at a time, ``timeout_s`` seconds per request."""
    if not urls:
        return []
    with ThreadPoolExecutor(len(urls)) as threads:
        return list(threads.map(lambda url: _probe(url.rstrip("/"), timeout_s), urls))


def _probe(url: str, timeout_s: float) -> ServerState:
    try:
        get(f"{url}/health", timeout_s)
        info: Any = json.loads(get(f"{url}/model_info", timeout_s))
        return ServerState(url, None, str(info["model_path"]), str(info["weight_version"]))
    except urllib.error.HTTPError as error:
        return ServerState(url, f"HTTP {error.code}")
    except OSError as error:  # URLError and timeouts among them
        reason = getattr(error, "reason", error)
        return ServerState(url, "no answer in time" if isinstance(reason, TimeoutError) else str(reason))
    except (ValueError, KeyError, TypeError, http.client.HTTPException) as error:
        return ServerState(url, f"not a reply of /model_info ({type(error).__name__}: {error})")


def get(url: str, timeout_s: float) -> bytes:
    """The first ``MOST_BYTES`` of a page. Raises OSError (HTTPError and URLError are), HTTPException or ValueError."""
    with _DIRECT.open(url, timeout=timeout_s) as response:
        return bytes(response.read(MOST_BYTES))
