"""A real Slurm of two nodes on this machine: its own munged, slurmctld and two slurmd, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "munged")
NODES = ("n1", "n2")
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/socket,cred_expire={expire_s}
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
SwitchType=switch/none
MpiDefault=none
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
EXPIRE_S = 5
"""Seconds that a job that was queued again waits at least (120 by default)."""


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs."""

    place: Path

    def run(self, *words: str, **environment: str) -> str:
        """What a command of Slurm's prints. Raises CalledProcessError."""
        own = os.environ | {"SLURM_CONF": str(self.place / "slurm.conf")} | environment
        return subprocess.run(words, check=True, capture_output=True, text=True, env=own).stdout

    def state_of(self, job: str) -> dict[str, str]:
        """What ``scontrol`` says of a job."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def why_not() -> str:
    """Why this machine cannot have one; empty where it can. Installs Debian's packages where that is allowed."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    if missing() and shutil.which("apt-get"):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
        subprocess.run(["apt-get", "update"], **quiet)
        install = ["apt-get", "install", "-y", "--no-install-recommends", "slurm-wlm", "munge"]
        subprocess.run(install, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}, **quiet)
    return f"no {', '.join(missing())} (Debian's slurm-wlm and munge), and none can be installed" if missing() else ""


def missing() -> list[str]:
    """Programs that are not there."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def slurm(expire_s: int = EXPIRE_S) -> Iterator[Slurm]:
    """Two idle nodes."""
    place = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    place.chmod(0o755)
    host = socket.gethostname().partition(".")[0]
    ports = free_ports(1 + len(NODES))
    lines = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    text = CONFIGURATION.format(host=host, port=ports[0], place=place, expire_s=expire_s, nodes="\n".join(lines))
    (place / "slurm.conf").write_text(text)
    (place / "state").mkdir()
    conf = ["-D", "-f", str(place / "slurm.conf")]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        start_munge(place, processes)
        start(["slurmctld", *conf], place / "slurmctld.out", processes)
        for node in NODES:
            start(["slurmd", *conf, "-N", node], place / f"slurmd-{node}.out", processes)
        made = Slurm(place)
        wait_until_idle(made)
        yield made
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
        shutil.rmtree(place, ignore_errors=True)


def start(words: list[str], log: Path, processes: list[subprocess.Popen[bytes]], **become: int) -> None:
    """A daemon in the foreground, which joins ``processes``."""
    with log.open("wb") as out:
        started = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, **become
        )
    processes.append(started)


def start_munge(place: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """A munged with a key and a socket of its own, as its user where there is one."""
    directory = place / "munge"
    directory.mkdir()
    (directory / "key").write_bytes(os.urandom(128))
    (directory / "key").chmod(0o600)
    directory.chmod(0o755)
    user = next((entry for entry in pwd.getpwall() if entry.pw_name == "munge"), None)
    for path in (directory, directory / "key") if user else ():
        os.chown(path, user.pw_uid, user.pw_gid)
    words = ["munged", "--foreground", "--force", f"--socket={directory}/socket", f"--key-file={directory}/key"]
    words += [f"--pid-file={directory}/pid", f"--seed-file={directory}/seed", f"--log-file={directory}/log"]
    become = {"user": user.pw_uid, "group": user.pw_gid} if user else {}
    start(words, place / "munged.out", processes, **become)


def wait_until_idle(made: Slurm, timeout: float = 60.0) -> None:
    """Raises AssertionError with what Slurm says instead."""
    deadline, said = time.monotonic() + timeout, ""
    while time.monotonic() < deadline:
        with contextlib.suppress(subprocess.CalledProcessError):
            said = made.run("sinfo", "--noheader", "--Node", "--format=%T")
            if said.split() == ["idle"] * len(NODES):
                return
        time.sleep(0.5)
    raise AssertionError(f"the nodes are not idle: {said}{(made.place / 'slurmctld.log').read_text()[-3000:]}")


def free_ports(count: int) -> list[int]:
    """Distinct ones, as far as one can tell."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
