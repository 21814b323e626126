"""Where the servers of other nodes are: written, found, waited for, and not believed from just anybody."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from megatron_gspo.calls import SERVER_KEY
from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import ConfigError, EngineUnavailableError
from megatron_gspo.rollout.addresses import announce, find_key, named, read, shared_key, wait_for


@pytest.fixture(autouse=True)
def _without_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SERVER_KEY, raising=False)


@pytest.fixture
def healthy() -> Iterator[str]:
    """The URL of what answers as a healthy server does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b'{"model_path": "model", "weight_version": "0"}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def configured(directory: Path, nodes: int = 1, start_s: float = 0.1) -> RolloutConfig:
    return RolloutConfig(servers_from=str(directory), server_nodes=nodes, server_start_s=start_s)


def test_the_servers_of_all_nodes_are_found_by_name(tmp_path: Path) -> None:
    announce(tmp_path, "node-2", ("http://10.0.0.2:1",))
    announce(tmp_path, "node-1", ("http://10.0.0.1:1", "http://10.0.0.1:2"))
    assert named(configured(tmp_path)) == (("http://10.0.0.1:1", "http://10.0.0.1:2", "http://10.0.0.2:1"), "")


def test_as_many_nodes_are_waited_for_as_the_configuration_says_and_silent_ones_do_not_count(
    tmp_path: Path, healthy: str
) -> None:
    announce(tmp_path, "up", (healthy,))
    assert wait_for(configured(tmp_path)) == ((healthy,), "")
    announce(tmp_path, "gone", ("http://127.0.0.1:1",))
    assert wait_for(configured(tmp_path)) == ((healthy,), ""), "one that does not answer is left out"
    with pytest.raises(EngineUnavailableError, match=r"of 1 of 2 nodes after .*http://127\.0\.0\.1:1: .*refused"):
        wait_for(configured(tmp_path, nodes=2))


def test_nodes_that_start_together_agree_on_one_key_that_only_this_user_reads(tmp_path: Path) -> None:
    directory, keys = tmp_path / "servers", []
    threads = [threading.Thread(target=lambda: keys.append(shared_key(directory))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8 and len(set(keys)) == 1 and len(keys[0]) > 40
    assert (directory / "key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in directory.iterdir()] == ["key"]


def test_the_key_of_the_environment_comes_first_and_is_written_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SERVER_KEY, "of-the-environment")
    assert shared_key(tmp_path) == find_key(tmp_path) == "of-the-environment"
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    shared_key(tmp_path)
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(ConfigError, match="so others can open it: chmod 600"):
        find_key(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"urls": "x"}', '{"urls": ["ftp://x"]}', '{"urls": [1]}', '{"a": ['])
def test_a_file_that_names_no_servers_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.json").write_text(text)
    with pytest.raises(ConfigError, match=r"node\.json does not say where a node's servers are"):
        read(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    announce(tmp_path, "node", ("http://10.0.0.1:1",))
    os.chown(tmp_path / "node.json", 12345, -1)
    with pytest.raises(ConfigError, match="of another user"):
        read(tmp_path)


@pytest.mark.parametrize("node", ["", "../x", "a/b", ".hidden", "x" * 101])
def test_a_name_that_would_be_another_file_is_refused(tmp_path: Path, node: str) -> None:
    with pytest.raises(ConfigError, match="no name of a node"):
        announce(tmp_path, node, ("http://10.0.0.1:1",))


def test_servers_are_named_in_one_way_or_the_other() -> None:
    with pytest.raises(ValueError, match="keep one of them"):
        RolloutConfig(servers=["http://10.0.0.1:1"], servers_from="x")
    with pytest.raises(ValueError, match="server_nodes = 2 are those in servers_from"):
        RolloutConfig(server_nodes=2)
