"""Two hosts on one machine: network namespaces with a wire between them, each with an address of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
RUN = "torch.distributed.run"
WIRE = "wire"
"""The interface's name on each host."""


@dataclass
class Host:
    """A namespace, and the processes that were started in it."""

    name: str
    address: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(
        self, words: list[str], log: Path, program: str = sys.executable, **environment: str
    ) -> subprocess.Popen[str]:
        """A process of this host; what it says goes to ``log``."""
        own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        own |= {"GLOO_SOCKET_IFNAME": WIRE, "PYTHON": sys.executable} | environment
        with log.open("a") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, program, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
                env=own,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def end(self) -> None:
        """Kills whatever still runs."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def why_not() -> str:
    """Why this machine cannot have namespaces; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` (Debian's iproute2)"
    tried = subprocess.run(["ip", "netns", "add", "mgspo-try"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", "mgspo-try"], capture_output=True)
    return f"`ip netns add` fails: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Connected, and gone afterwards with what ran on them."""
    mark = f"{os.getpid() % 100000}"
    hosts = (Host(f"mgspo-a-{mark}", "10.77.0.1"), Host(f"mgspo-b-{mark}", "10.77.0.2"))
    wires = f"va{mark}", f"vb{mark}"
    with contextlib.ExitStack() as stack:
        for host in hosts:
            ip("netns", "add", host.name)
            stack.callback(ip, "netns", "delete", host.name)
            stack.callback(host.end)
        ip("link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for host, wire in zip(hosts, wires, strict=True):
            ip("link", "set", wire, "netns", host.name)
            ip("-n", host.name, "link", "set", wire, "name", WIRE)
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", WIRE)
            ip("-n", host.name, "link", "set", WIRE, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts


def ip(*words: str) -> None:
    """``ip``; raises CalledProcessError."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


def ranks_under(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The ranks of the torchrun that a script has started: not what they have forked."""
    launchers = [child for child in psutil.Process(process.pid).children() if RUN in child.cmdline()]
    return [rank for launcher in launchers for rank in launcher.children() if "megatron_gspo.cli" in rank.cmdline()]


def wait_until(condition: Callable[[], bool], *processes: subprocess.Popen[str], timeout: float = 200.0) -> None:
    """Raises AssertionError when it does not become true, or a process ends first."""
    deadline = time.monotonic() + timeout
    while not condition():
        ended = [process.args for process in processes if process.poll() is not None]
        assert not ended, f"ended before: {ended}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
