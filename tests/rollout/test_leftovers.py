"""Of a server nothing is left on the machine, however it or its parent ends. The server here is a script."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gspo.rollout.sglang import launcher, process
from megatron_gspo.rollout.sglang import server as sglang_server
from tests.rollout.test_launcher import HEALTHY, fake_python

ROOT = Path(launcher.__file__).parents[3]
LEAVES = f"""
import _multiprocessing, mmap, os, socket, sys, tempfile, threading
sys.path.insert(0, {str(ROOT)!r})
from megatron_gspo.rollout.sglang.server import PARENT, die_with
threading.Thread(target=die_with, args=(int(os.environ[PARENT]),), daemon=True).start()
name = f"mgspo-test-{{os.getpid()}}"
with open("/dev/shm/" + name, "wb+") as segment:
    segment.write(bytes(4096))
    segment.flush()
    kept = mmap.mmap(segment.fileno(), 4096)
opened = open("/dev/shm/" + name + "-open", "w")
semaphore = _multiprocessing.SemLock(0, 1, 1, "/" + name, False)
unix = socket.socket(socket.AF_UNIX)
unix.bind(tempfile.mktemp())
""" + HEALTHY.replace("signal.SIG_IGN", "signal.SIG_DFL", 1)
PARENT = """
import os, signal, sys, time
from megatron_gspo.config import RolloutConfig
from megatron_gspo.rollout.sglang.launcher import LocalServers
config = RolloutConfig(server_python=sys.argv[1], local_servers=2)
try:
    with LocalServers(config, "model", sys.argv[2], device="cpu", dtype="float32") as servers:
        print(*[server._process.pid for server in servers._servers], flush=True)
        sys.stdin.readline()
        for _ in range(200):  # a process that was killed is there for a moment
            servers.check()
            time.sleep(0.05)
except Exception as error:
    print(type(error).__name__)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A short directory: a UNIX socket's path has 107 bytes."""
    directory = Path(tempfile.mkdtemp(prefix="left-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


def of(groups: list[int]) -> list[str]:
    return [
        name for name in os.listdir("/dev/shm") for group in groups if re.search(rf"mgspo-test-{group}(?!\d)", name)
    ]


@pytest.mark.parametrize("ending", ["one killed and one stopped", "parent killed"])
def test_no_shared_memory_semaphore_or_socket_is_left(tmp_path: Path, temporary: Path, ending: str) -> None:
    command = [sys.executable, "-c", PARENT, fake_python(tmp_path, LEAVES), str(tmp_path / "logs")]
    environment = os.environ | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        groups = [int(word) for word in parent.stdout.readline().split()]
        assert len(of(groups)) == 6, "each server has a segment, an open file and a semaphore"
        assert len(list(temporary.glob("mgspo-server-*/tmp*"))) == 2, "and a socket"
        assert all(path.stat().st_mode & 0o077 == 0 for path in temporary.iterdir())
        if ending == "parent killed":
            parent.kill()
        else:
            os.killpg(groups[0], signal.SIGKILL)
            parent.stdin.close()
        said = parent.stdout.read().split()
    deadline = time.monotonic() + 60
    while any(map(sglang_server.members, groups)) or of(groups) or list(temporary.iterdir()):
        assert time.monotonic() < deadline, (of(groups), list(temporary.iterdir()))
        time.sleep(0.05)
    assert said == ([] if ending == "parent killed" else ["EngineUnavailableError"])


def test_weights_on_their_way_are_not_a_servers_shared_memory() -> None:
    """A server maps the files of a sync, which lie in a directory there and are not its own."""
    code = "import mmap, sys, time\nf = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1)\n"
    code += "print(flush=True); time.sleep(600)"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory, tempfile.NamedTemporaryFile(dir="/dev/shm") as own:
        for path in (Path(directory) / "weights", Path(own.name)):
            path.write_bytes(bytes(4096))
            command = [sys.executable, "-c", code, str(path)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
                assert process.stdout is not None
                process.stdout.readline()
                found = sglang_server.shared_memory(process.pid)
                process.kill()
            assert found == ({own.name} if path == Path(own.name) else set())


def test_a_long_temporary_directory_leaves_room_for_a_sockets_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    directory = process.private_files()
    assert re.fullmatch(r"/tmp/mgspo-server-\w+", directory)
    Path(directory).rmdir()
