"""What a local run listens on: nothing that another machine reaches, and no store that another user reaches."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_gspo.calls import call
from megatron_gspo.parallel.rendezvous import STORE, exposed_store, is_loopback, keep_to_loopback, private_store
from megatron_gspo.rollout.sglang.probe import find_key
from tests.rollout.conftest import require_sglang
from tests.training.conftest import QUICKSTART

pytestmark = pytest.mark.timeout(500)


def listeners(process: psutil.Process) -> set[tuple[str, str]]:
    """(command, address) of every listening TCP socket of a process and of all that came from it."""
    found = set()
    for member in [process, *process.children(recursive=True)]:
        try:
            name = " ".join(member.cmdline()) or member.name()
            found |= {(name, c.laddr.ip) for c in member.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        except psutil.Error:  # it has ended
            continue
    return found


ORDERS = (
    *("/generate", "/weights_checker", "/update_weight_version", "/release_memory_occupation", "/pause_generation"),
    *("/flush_cache", "/abort_request", "/update_weights_from_disk", "/begin_weight_update", "/server_info"),
)


def bystander(log: Path) -> dict[str, int]:
    """HTTP status of each order that somebody without the key gives to the run's server, once it is up."""
    started = re.search(r"Uvicorn running on (http://[\d.:]+)", log.read_text() if log.exists() else "")
    if not started:
        return {}
    return {path: call(started[1] + path, b"{}", key="guess", timeout_s=30).status for path in ORDERS}


@pytest.mark.rollout
def test_a_run_with_its_own_ranks_and_server_listens_on_loopback_alone(overrides: list[str], tmp_path: Path) -> None:
    require_sglang()
    settings = [*overrides, 'sync.method="distributed"', "eval.every=0", "train.save_hf=false"]
    settings += ["train.outer_steps=1"]
    command = [sys.executable, "-m", "megatron_gspo.cli", "train", str(QUICKSTART / "gspo.toml"), *settings]
    found: set[tuple[str, str]] = set()
    with (tmp_path / "out").open("w") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        process = psutil.Process(run.pid)
        refusals: dict[str, int] = {}
        key = ""
        while run.poll() is None:
            found |= listeners(process)
            key = key or find_key(tmp_path / "run" / "servers")
            refusals = refusals or bystander(tmp_path / "run" / "servers" / "sglang-0.log")
            time.sleep(0.2)
    assert run.returncode == 0, (tmp_path / "out").read_text()
    assert any("sglang" in name for name, _ in found), "no server was seen"
    assert len([name for name, _ in found if "megatron_gspo.cli" in name]) >= 1, "gloo's own sockets were not seen"
    assert {name for name, address in found if not is_loopback(address)} == set()
    assert refusals == dict.fromkeys(ORDERS, 401)
    log = (tmp_path / "run" / "servers" / "sglang-0.log").read_text()
    assert key and "api_key" in log and key not in log
    assert key not in " ".join(name for name, _ in found), "on a command line"
    assert not (tmp_path / "run" / "servers" / "key").exists()


def test_ranks_meet_in_a_directory_that_only_the_user_reads() -> None:
    with private_store() as directory:
        assert directory.stat().st_mode & 0o077 == 0
        assert os.environ[STORE] == str(directory / "store")
    assert not directory.exists()
    assert STORE not in os.environ


@pytest.mark.parametrize(
    ("urls", "kept"),
    [
        ((), True),
        (("http://127.0.0.1:30000", "http://localhost:30001", "http://[::1]:30002"), True),
        (("http://127.0.0.1:30000", "http://10.0.0.7:30000"), False),
        (("http://node7:30000",), False),
    ],
)
def test_gloo_and_nccl_leave_loopback_only_for_servers_elsewhere(
    monkeypatch: pytest.MonkeyPatch, urls: tuple[str, ...], kept: bool
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    keep_to_loopback(urls)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == ("lo" if kept else None)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"  # the user's own


def test_torchrun_on_one_machine_is_told_that_its_store_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MASTER_ADDR": "host", "MASTER_PORT": "29500", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(STORE, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "(host:29500) listens on all interfaces, without authentication" in exposed_store()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert exposed_store() == ""  # ranks of two machines have to meet somewhere
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv(STORE, "/private/store")
    assert exposed_store() == ""
