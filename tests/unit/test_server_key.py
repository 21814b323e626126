"""The key of servers is read from one place, and stands in nothing that a run writes or prints."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from megatron_gspo import cli
from megatron_gspo.calls import MOST_KEY, SERVER_KEY, SERVER_KEY_FILE, server_key
from megatron_gspo.compare.cell import run_cell
from megatron_gspo.config import RunConfig, parse
from megatron_gspo.errors import ConfigError
from megatron_gspo.report.recorder import RunRecorder
from megatron_gspo.rollout.sglang.arguments import server_environment
from megatron_gspo.rollout.sglang.probe import find_key
from tests.unit.report_runs import make_config, make_report

KEY = "sk-6Yq0pXw1-never-shown"


def key_file(directory: Path, content: bytes = KEY.encode() + b"\n", mode: int = 0o600) -> Path:
    path = directory / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_the_key_is_what_its_variable_or_its_file_holds(tmp_path: Path) -> None:
    assert server_key({}) == "" == server_key({SERVER_KEY: "", SERVER_KEY_FILE: ""})
    assert server_key({SERVER_KEY: KEY}) == KEY
    for content in (KEY, f"{KEY}\n", f"{KEY}\r\n"):
        assert server_key({SERVER_KEY_FILE: str(key_file(tmp_path, content.encode()))}) == KEY


def test_two_places_for_one_key_are_refused(tmp_path: Path) -> None:
    file = key_file(tmp_path)
    with pytest.raises(ConfigError, match=f"{SERVER_KEY} and {SERVER_KEY_FILE} = {file} are both set") as caught:
        server_key({SERVER_KEY: KEY, SERVER_KEY_FILE: str(file)})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o610])
def test_a_file_that_others_can_open_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}.*chmod 600") as caught:
        server_key({SERVER_KEY_FILE: str(key_file(tmp_path, mode=mode))})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b" ", b"two words", b"one\ntwo\n", b"\n\n", b" led", b"\xff\xfe", "schlüssel".encode(), b"a\0b"],
)
def test_what_cannot_be_sent_is_no_key_and_is_not_shown(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="holds no key") as caught:
        server_key({SERVER_KEY_FILE: str(key_file(tmp_path, content))})
    assert not content.strip() or content.decode("latin-1") not in str(caught.value)
    if content and (text := content.decode("latin-1")) != "\n":
        with pytest.raises(ConfigError, match=f"{SERVER_KEY} holds no key"):
            server_key({SERVER_KEY: text})


@pytest.mark.parametrize("more", [b"", b"\n", b"\r\n", b"\nmore", b"x"])
def test_a_key_ends_with_its_file(tmp_path: Path, more: bytes) -> None:
    """None is cut off where reading stops."""
    file = key_file(tmp_path, b"k" * MOST_KEY + more)
    if more.strip():
        with pytest.raises(ConfigError, match="holds no key"):
            server_key({SERVER_KEY_FILE: str(file)})
    else:
        assert server_key({SERVER_KEY_FILE: str(file)}) == "k" * MOST_KEY


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"{SERVER_KEY_FILE} = {path} cannot be read"):
            server_key({SERVER_KEY_FILE: str(path)})


def test_a_server_that_is_started_here_is_not_told_where_another_key_lies(tmp_path: Path) -> None:
    told = server_environment({SERVER_KEY_FILE: str(tmp_path / "key")}, "cpu", "made-for-it")
    assert told[SERVER_KEY] == "made-for-it" and SERVER_KEY_FILE not in told


def test_a_cell_with_servers_of_its_own_forgets_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    monkeypatch.setenv(SERVER_KEY_FILE, str(key_file(tmp_path)))
    monkeypatch.setenv(SERVER_KEY, "")
    monkeypatch.setattr("megatron_gspo.compare.cell.die_with_parent", stop)
    with pytest.raises(Stop):
        run_cell(None, None, "made-for-them")  # type: ignore[arg-type]
    assert server_key() == "made-for-them"


@pytest.mark.parametrize("arguments", [["--api-key", KEY], [f"--api-key={KEY}"], ["--admin-api-key", KEY]])
def test_a_key_on_a_servers_command_line_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="stands on a command line, which everybody can read") as caught:
        make_config(tmp_path / "run", rollout={"server_args": arguments})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("url", [f"http://user:{KEY}@h:1", f"http://{KEY}@h:1", f"https://:{KEY}@h"])
def test_a_password_in_an_address_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="holds a user or a password") as caught:
        make_config(tmp_path / "run", rollout={"servers": [url]})
    assert KEY not in str(caught.value)


def test_a_run_writes_and_prints_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The recorder, its manifest and page, ``status``, ``report`` and ``doctor`` with a key at hand."""
    monkeypatch.setenv(SERVER_KEY_FILE, str(key_file(tmp_path)))
    run = tmp_path / "run"
    config = with_dead_server(run)
    with RunRecorder(config, 2) as recorder:
        recorder.engine({"version": "0.5", "urls": list(config.rollout.servers)})
        recorder.phase("training")
        recorder.steps([make_report(0, minibatch) for minibatch in range(4)])
        assert find_key(run / "servers") == KEY  # what `status` asks servers with
        assert cli.main(["status", str(run)]) == 0
    assert cli.main(["status", str(run), "--json"]) == 0
    assert cli.main(["explain", "rollout.servers"]) == 0
    assert cli.main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert cli.main(["doctor", str(run / "config.toml")]) in (0, 1, 2)
    printed = "".join(capfd.readouterr())
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path != tmp_path / "key"]
    assert {path.name for path in written} >= {"config.toml", "manifest.json", "metrics.jsonl", "page.html"}
    assert config.rollout.servers[0] in printed
    assert KEY not in printed
    assert not [path for path in written if KEY.encode() in path.read_bytes()]


def with_dead_server(run: Path) -> RunConfig:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    tree = make_config(run).model_dump(mode="json", exclude_unset=True)
    return parse(tree | {"rollout": {"servers": [url]}})
