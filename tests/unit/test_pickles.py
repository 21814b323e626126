"""Pickles go from the trainer to the servers that the configuration names, and come back from nobody.

Whoever unpickles runs what the sender wrote, and whoever is sent a pickle gets the weights.
"""

from __future__ import annotations

import ast
import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import megatron_gspo
from megatron_gspo.errors import SyncError
from megatron_gspo.rollout.sglang.control import Servers
from tests.unit.test_calls import answer, server

PACKAGE = Path(megatron_gspo.__file__).parent
SENDS = {"sync/tensor.py", "sync/handles.py"}
"""What makes pickles for servers: weights, or handles to them."""
READS = {
    "parallel/exchange.py": "between ranks, over the network that is trusted",
    "megatron/checkpoint_files.py": "descriptions of tensors alone, by a reader that runs nothing",
    "megatron/checkpoint_stream.py": "as that one says",
    "dryrun/__init__.py": "between a process and its own child",
    "dryrun/child.py": "between a process and its own child",
    "data/rendering.py": "between a process and its own child",
    "data/template_worker.py": "between a process and its own child",
}


def names_in(path: Path, *attributes: str) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.Attribute) and node.attr in attributes for node in ast.walk(tree))


def imports_pickle(path: Path) -> bool:
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Import)]
    return any(alias.name in ("pickle", "dill", "cloudpickle") for node in nodes for alias in node.names)


def files(condition: Callable[[Path], bool]) -> set[str]:
    return {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if condition(path)}


def test_pickles_are_made_in_two_files_for_servers_and_read_where_a_reason_is_given() -> None:
    assert files(imports_pickle) == SENDS | READS.keys()
    assert not any(names_in(PACKAGE / name, "loads", "load", "Unpickler") for name in SENDS - {"sync/tensor.py"})


def test_they_leave_by_two_calls_of_the_engines_control() -> None:
    """Which sends to its own list of addresses, that of ``rollout.servers`` or of servers that the run has started."""
    assert files(lambda path: names_in(path, "post_tensors", "post_handles")) == {"sync/tensor.py", "sync/ipc.py"}


@pytest.mark.parametrize(
    ("send", "path"),
    [
        (lambda servers: servers.post_tensors(b"weights"), "/update_weights_from_tensor"),
        (lambda servers: servers.post_handles([[b"weights"]]), "/update_weights_from_tensor"),
    ],
)
def test_a_server_that_names_another_address_is_not_believed(send: Callable[[Servers], None], path: str) -> None:
    """Neither by a redirect nor in what it says of itself."""
    reached: list[bytes] = []
    with server(lambda peer, request: reached.append(request) or peer.sendall(answer(b"{}"))) as (elsewhere, _):  # type: ignore[func-returns-value]
        host = elsewhere.removeprefix("http://")
        info = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "host": host, "url": elsewhere, "dist_init_addr": host}

        def talk(peer: socket.socket, request: bytes) -> None:
            if request.startswith(b"GET"):
                peer.sendall(answer(json.dumps(info).encode()))
            else:
                peer.sendall(answer(b"{}", "307 Temporary Redirect", f"Location: {elsewhere}{path}\r\n"))

        with server(talk) as (url, requests), pytest.raises(SyncError, match="HTTP 307"):
            send(Servers([url], 5))
    assert any(request.startswith(f"POST {path} ".encode()) for request in requests)
    assert reached == []
