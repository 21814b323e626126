"""Local servers start, are waited for, and are gone afterwards. The server here is a script that misbehaves."""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from megatron_gspo.calls import SERVER_KEY
from megatron_gspo.config import RolloutConfig
from megatron_gspo.errors import ConfigError, DependencyError, EngineUnavailableError
from megatron_gspo.rollout.sglang import launcher, process
from megatron_gspo.rollout.sglang import server as sglang_server
from megatron_gspo.rollout.sglang.launcher import (
    LocalServers,
    find_server_python,
    free_ports,
    server_arguments,
    server_environment,
)
from megatron_gspo.rollout.sglang.probe import find_key

HEALTHY = """
import http.server, os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health_generate" else 404)
        self.end_headers()
port = int(sys.argv[sys.argv.index("--port") + 1])
while os.path.exists(__file__ + ".hold"): time.sleep(0.02)
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def fake_python(directory: Path, script: str) -> str:
    """A 'python' that runs ``script`` with the server's arguments, whatever it is told to run."""
    (directory / "server.py").write_text(script)
    python = directory / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {directory}/server.py "$@"\n')
    python.chmod(0o755)
    return str(python)


def servers(directory: Path, script: str, count: int = 1, start_s: float = 120.0, **settings: int) -> LocalServers:
    config = RolloutConfig(
        server_python=fake_python(directory, script), local_servers=count, server_start_s=start_s, **settings
    )
    return LocalServers(config, "model", directory / "logs", device="cpu", dtype="float32")


def test_the_key_is_for_this_users_eyes_and_goes_with_the_servers(tmp_path: Path) -> None:
    with servers(tmp_path, HEALTHY) as local:
        key = tmp_path / "logs" / "key"
        assert key.read_text() == local.key and len(local.key) > 40
        assert key.stat().st_mode & 0o777 == 0o600
        told = [psutil.Process(pid) for server in local._servers for pid in processes_of(server._process.pid)]
        assert all(local.key not in " ".join(process.cmdline()) for process in told)
        assert all(process.environ()[SERVER_KEY] == local.key for process in told)
        assert find_key(tmp_path / "logs") == local.key
    assert not key.exists()
    with servers(tmp_path, HEALTHY) as other:
        assert other.key != local.key


def processes_of(group: int) -> list[int]:
    return process.group_members(group)


def test_servers_that_ignore_the_request_to_stop_are_killed_with_their_children(tmp_path: Path) -> None:
    groups: list[int] = []

    def run() -> None:
        with servers(tmp_path, HEALTHY, count=2) as local:
            assert len(set(local.urls)) == 2
            groups.extend(server._process.pid for server in local._servers)
            assert [len(processes_of(group)) for group in groups] == [2, 2]
            local.check()
            raise KeyError("the run fails")

    with pytest.raises(KeyError, match="the run fails"):
        run()
    assert [processes_of(group) for group in groups] == [[], []]
    assert (tmp_path / "logs" / "sglang-1.log").exists()


def test_a_server_that_has_started_is_told_to_freeze_what_its_start_has_made(tmp_path: Path) -> None:
    with servers(tmp_path, HEALTHY):
        asked = (tmp_path / "logs" / "sglang-0.log").read_text()
    assert asked.index("GET /health_generate") < asked.index("GET /freeze_gc")


def test_a_server_that_exits_is_reported_in_one_line_with_its_log_and_what_stands_last_in_it(tmp_path: Path) -> None:
    script = "print('reading'); print('no such model'); raise SystemExit(3)"
    with pytest.raises(EngineUnavailableError, match=r"exited with 3; its log .*sglang-0\.log: no such model$"):
        servers(tmp_path, script).__enter__()


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("usage: x [-h]\n          [--tp N]\nx: error: unrecognized arguments: --tpp 2\n", "unrecognized .* --tpp 2$"),
        (
            "Traceback:\n  File x\nValueError: no weights\n[12:00] Received sigquit from a child\n",
            "Error: no weights$",
        ),
        ("\n\n", "(empty)"),
    ],
)
def test_the_last_words_of_a_log_are_the_line_that_names_an_error(log: str, said: str) -> None:
    words = process.last_words(log)
    assert "\n" not in words and re.search(said, words)


def test_a_server_that_never_answers_is_given_up_and_stopped(tmp_path: Path) -> None:
    script = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(EngineUnavailableError, match=r"not healthy within rollout\.server_start_s"):
        servers(tmp_path, script, start_s=4.0).__enter__()
    pid = int((tmp_path / "logs" / "sglang-0.log").read_text().split()[0])
    assert processes_of(pid) == []


def test_a_server_that_dies_during_the_run_is_noticed_by_check(tmp_path: Path) -> None:
    with servers(tmp_path, HEALTHY.replace("SIG_IGN", "SIG_DFL")) as local:
        process = local._servers[0]._process
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with pytest.raises(EngineUnavailableError, match="exited with -9"):
            local.check()


def until_sound(local: LocalServers, *, most_s: float = 60.0) -> None:
    deadline = time.monotonic() + most_s
    while local.mend():
        assert time.monotonic() < deadline, local.mend()
        time.sleep(0.1)


def test_servers_that_have_died_or_are_silent_are_started_again_so_often_as_is_allowed(tmp_path: Path) -> None:
    with servers(tmp_path, HEALTHY.replace("SIG_IGN", "SIG_DFL"), count=2, server_restarts=2) as local:
        first, second = local.urls
        assert local.mend() == {} and local.restarts == 0
        hold = tmp_path / "server.py.hold"
        hold.touch()  # whoever starts now goes on starting
        os.killpg(local._servers[0]._process.pid, signal.SIGKILL)
        local._servers[0]._process.wait()
        assert "exited with -9" in local.mend()[first]
        assert first in local.mend([first]), "one that is still starting is not started again"
        hold.unlink()
        until_sound(local)
        assert (local.restarts, (tmp_path / "logs" / "sglang-0.1.log").exists()) == (1, True)
        silent = local._servers[1]._process.pid
        os.killpg(silent, signal.SIGSTOP)  # it runs, and answers nobody
        assert local.mend([second]) == {second: f"{second} runs, and generates nothing"}
        until_sound(local)
        assert processes_of(silent) == []
        died, hung = local.said
        assert died.startswith(f"the rollout server of {first} exited with -9; its log {tmp_path}/logs/sglang-0.log: ")
        assert died.endswith("; it is started again (1 of 2 times)")
        assert hung == f"{second} runs, and generates nothing; it is started again (2 of 2 times)"
        os.killpg(local._servers[0]._process.pid, signal.SIGKILL)
        local._servers[0]._process.wait()
        assert [*local.mend()] == [*local.mend()] == [first]
        assert local.restarts == 2 and "it stays away: rollout.server_restarts = 2" in local.said[-1]
        assert len(local.said) == 3


TOO_LATE = """
import time
time.sleep(600)
"""


def test_a_program_that_has_taken_the_port_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setattr(launcher, "free_ports", lambda count, host: [port])
    (tmp_path / "impostor.py").write_text(HEALTHY)
    with subprocess.Popen([sys.executable, str(tmp_path / "impostor.py"), "--port", str(port)]) as impostor:
        try:
            with pytest.raises(EngineUnavailableError, match="answered by a program that is not the server started"):
                servers(tmp_path, TOO_LATE).__enter__()
        finally:
            for process in psutil.Process(impostor.pid).children():
                process.kill()
            impostor.kill()


def test_a_port_that_changes_hands_during_the_run_is_noticed_by_check(tmp_path: Path) -> None:
    end = "server.handle_request(); server.handle_request(); server.server_close(); time.sleep(600)"
    start = 'server = http.server.HTTPServer(("127.0.0.1", port), Handler)'
    script = "\n".join([*HEALTHY.strip().splitlines()[:-1], start, end])
    with servers(tmp_path, script) as local:
        deadline = time.monotonic() + 60
        while local._servers[0]._listens():  # it gives the port up after the launcher's own two requests
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(EngineUnavailableError, match="something else has taken its port"):
            local.check()


def test_a_server_ends_with_its_parent_even_when_it_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "orphan.py"
    checkout = Path(launcher.__file__).resolve().parents[3]
    script.write_text(
        f"import os, sys, time, threading; sys.path.insert(0, {str(checkout)!r})\n"
        "from megatron_gspo.rollout.sglang.server import die_with\n"
        "threading.Thread(target=die_with, args=(int(os.environ['MEGATRON_GSPO_PARENT_PID']),), daemon=True).start()\n"
        "time.sleep(600)\n"
    )
    parent_code = (
        "import os, subprocess, sys, time\n"
        "os.environ['MEGATRON_GSPO_PARENT_PID'] = str(os.getpid())\n"
        f"p = subprocess.Popen([sys.executable, {str(script)!r}], start_new_session=True)\n"
        "print(p.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        group = int(parent.stdout.readline())
        time.sleep(1.0)
        assert processes_of(group) == [group]
        parent.kill()
    deadline = time.monotonic() + 60
    while processes_of(group):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_python_of_the_server_is_found_in_the_documented_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(launcher.SERVER_PYTHON, raising=False)
    monkeypatch.setattr(
        launcher, "__file__", str(tmp_path / "checkout" / "megatron_gspo" / "rollout" / "sglang" / "launcher.py")
    )
    with pytest.raises(DependencyError, match="make install"):
        find_server_python()
    for root in (tmp_path / "checkout", tmp_path):
        python = root / ".venv-sglang" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
        assert find_server_python() == python
    named = tmp_path / "named"
    named.touch()
    monkeypatch.setenv(launcher.SERVER_PYTHON, str(named))
    assert find_server_python() == named
    assert find_server_python(str(python)) == python
    with pytest.raises(ConfigError, match=r"rollout\.server_python = /nowhere: no such file"):
        find_server_python("/nowhere")


def test_a_cpu_server_is_seeded_single_threaded_and_starts_at_version_0() -> None:
    arguments = server_arguments(RolloutConfig(), "model", 1234, device="cpu", dtype="float64", seed=3)
    pairs = dict(itertools.pairwise(arguments))
    assert pairs["--model-path"] == "model"
    assert pairs["--port"] == "1234"
    assert pairs["--dtype"] == "float32"
    assert pairs["--weight-version"] == "0"
    assert pairs["--random-seed"] == "3"
    assert pairs["--attention-backend"] == "torch_native"
    assert pairs["--max-total-tokens"] == "32768"
    assert {"--sleep-on-idle", "--skip-tokenizer-init", "--enable-deterministic-inference"} <= set(arguments)


def test_a_server_captures_routes_only_when_a_run_asks_for_them() -> None:
    for routes in (False, True):
        arguments = server_arguments(RolloutConfig(), "model", 1, device="cpu", dtype="float32", routes=routes)
        assert ("--enable-return-routed-experts" in arguments) == routes


def test_a_gpu_server_is_seeded_only_on_request_and_the_users_arguments_come_last() -> None:
    config = RolloutConfig(server_args=("--mem-fraction-static", "0.7"))
    arguments = server_arguments(config, "model", 1, device="cuda", dtype="bfloat16", gpu=2)
    assert arguments[-2:] == ["--mem-fraction-static", "0.7"]
    assert arguments[arguments.index("--base-gpu-id") + 1] == "2"
    assert "torch_native" not in arguments
    assert "--enable-deterministic-inference" not in arguments
    seeded = server_arguments(RolloutConfig(seeded=True), "model", 1, device="cuda", dtype="bfloat16")
    assert "--enable-deterministic-inference" in seeded


def test_a_server_inherits_nothing_of_torchrun_or_of_this_pythons_path() -> None:
    environment = {"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "PYTHONPATH": "here", "PATH": "p", "OMP_NUM_THREADS": "8"}
    assert server_environment(environment, "cpu", "k") == {
        "PATH": "p",
        "OMP_NUM_THREADS": "1",
        "MEGATRON_GSPO_PARENT_PID": str(os.getpid()),
        "MEGATRON_GSPO_SERVER_KEY": "k",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
    }
    assert server_environment(environment, "cuda")["OMP_NUM_THREADS"] == "8"


def test_ports_are_distinct_and_free() -> None:
    ports = free_ports(5)
    assert len(set(ports)) == 5
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_a_key_that_begins_as_an_option_does_is_still_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """One random key in 64 begins with a dash."""
    parser, parsed = argparse.ArgumentParser(), []
    parser.add_argument("--api-key")
    modules = {
        "sglang.launch_server": SimpleNamespace(run_server=parsed.append),
        "sglang.srt.server_args": SimpleNamespace(prepare_server_args=parser.parse_args),
        "sglang.srt.utils": SimpleNamespace(kill_process_tree=lambda *args, **settings: None),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("sglang", "sglang.srt"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setattr(sglang_server, "keep_from_log", lambda key: None)
    monkeypatch.setenv(SERVER_KEY, "-dGhpcyBpcyBhIGtleQ")
    sglang_server.serve([])
    assert [arguments.api_key for arguments in parsed] == ["-dGhpcyBpcyBhIGtleQ"]
