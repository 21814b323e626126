"""Where the servers are that ``megatron-gspo serve`` has started: a file a node, in a directory that all nodes share.

    node-1.json    {"urls": ["http://10.0.0.1:20517", ...]}, while the servers of that node are up
    key            what every request to them carries; for this user's eyes alone
    node-1/        logs of that node's servers

Whoever removes a node's file ends its servers.
Whoever can write into the directory can send the run's weights and prompts to servers of his own: files of other users
are refused, as is a key that others can read.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megatron_gspo.calls import key_in, server_key
from megatron_gspo.config import RolloutConfig
from megatron_gspo.config.rollouts import Url
from megatron_gspo.errors import ConfigError, EngineUnavailableError
from megatron_gspo.rollout.sglang.probe import KEY_FILE, probe
from megatron_gspo.storage import claiming, replace_text
from megatron_gspo.untrusted import read_json

SETTING = "rollout.servers_from"
NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""A node's name, which is a file's."""
MOST_BYTES = 2**20
POLL_S = 1.0
_URLS = TypeAdapter(tuple[Url, ...])


def file_of(directory: Path, node: str) -> Path:
    """Where a node says which servers it has. Raises ConfigError for a name that is none."""
    if not NODE.fullmatch(node):
        raise ConfigError(f"--node {node!r} is no name of a node: letters, digits, '.', '_' and '-'")
    return directory / f"{node}.json"


def announce(directory: Path, node: str, urls: tuple[str, ...]) -> None:
    """Says that a node's servers are up, in one move. Raises ConfigError and WriteError."""
    with claiming(f"{SETTING} = {directory}", directory):
        replace_text(file_of(directory, node), json.dumps({"urls": urls}) + "\n")


def read(directory: Path) -> dict[str, tuple[str, ...]]:
    """Node -> URLs, by name. Raises ConfigError for a file that is another user's, or none of ours."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        try:
            _check_owner(path)
            content = read_json(path, MOST_BYTES)
            found[path.stem] = _URLS.validate_python(tuple(content["urls"]), strict=False)
        except FileNotFoundError:  # its servers ended just now
            continue
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            what = " ".join(str(error).split())[:300]
            raise ConfigError(f"{SETTING}: {path} does not say where a node's servers are: {what}") from None
    return found


def shared_key(directory: Path) -> str:
    """The key of all nodes' servers: that of the environment, else what lies in the directory, where the first node
    puts a random one. Raises ConfigError for one that others can read."""
    if key := server_key():
        return key
    path = directory / KEY_FILE
    with claiming(f"{SETTING} = {directory}", directory):
        directory.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _offer(path, secrets.token_urlsafe(32))
    return find_key(directory)


def find_key(directory: Path) -> str:
    """As ``shared_key``, and makes none: "" where there is none."""
    if key := server_key():
        return key
    path = directory / KEY_FILE
    try:
        _check_owner(path)
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ConfigError(f"{SETTING}: {path} holds no key: {error}") from None
    return key_in(path, f"{SETTING}: {path}")


def named(rollout: RolloutConfig) -> tuple[tuple[str, ...], str]:
    """URLs and key of the running servers that a configuration names, as many as are there now. Raises ConfigError."""
    if not rollout.servers_from:
        return rollout.servers, server_key()
    directory = Path(rollout.servers_from)
    if not (nodes := read(directory)):
        raise ConfigError(f"{SETTING} = {directory} has no servers now: start `megatron-gspo serve` on their nodes")
    return tuple(url for urls in nodes.values() for url in urls), find_key(directory)


def wait_for(rollout: RolloutConfig) -> tuple[tuple[str, ...], str]:
    """URLs and key of the servers in ``servers_from`` once so many nodes as ``server_nodes`` have some that answer.

    Raises EngineUnavailableError after ``server_start_s``, with what is missing.
    """
    directory, deadline = Path(rollout.servers_from), time.monotonic() + rollout.server_start_s
    while True:
        nodes = read(directory)
        urls = tuple(url for urls in nodes.values() for url in urls)
        key = find_key(directory)
        silent = {state.url: state.error for state in probe(urls, key=key) if state.error is not None}
        ready = [node for node, its in nodes.items() if not silent.keys() & {url.rstrip("/") for url in its}]
        if len(ready) >= rollout.server_nodes:
            return tuple(url for node in ready for url in nodes[node]), key
        if time.monotonic() > deadline:
            raise EngineUnavailableError(_missing(rollout, ready, silent))
        time.sleep(POLL_S)


def _missing(rollout: RolloutConfig, ready: list[str], silent: dict[str, str]) -> str:
    answers = "; ".join(f"{url}: {error}" for url, error in list(silent.items())[:3])
    return (
        f"{SETTING} = {rollout.servers_from} has servers of {len(ready)} of {rollout.server_nodes} nodes after "
        f"{rollout.server_start_s:g} s (rollout.server_start_s){f'; {answers}' if answers else ''}: start "
        f"`megatron-gspo serve` on each node"
    )


def _offer(path: Path, key: str) -> None:
    """Puts a key there unless another node has meanwhile; nobody sees half of it."""
    own = path.with_name(f"{KEY_FILE}.{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(key)
        os.link(own, path)
    except FileExistsError:
        pass
    finally:
        own.unlink(missing_ok=True)


def _check_owner(path: Path) -> None:
    owner = path.stat().st_uid
    if owner not in (os.getuid(), 0):
        raise OSError(f"it is of another user (uid {owner})")
