"""One SGLang server as a process of this machine: watched from its start to its end."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

import psutil

from megatron_gspo.errors import ConfigError, EngineUnavailableError
from megatron_gspo.rollout.sglang.probe import get
from megatron_gspo.rollout.sglang.purpose import ROLLOUTS, Purpose
from megatron_gspo.rollout.sglang.server import FILES, remove, shared_memory
from megatron_gspo.storage import writing
from megatron_gspo.supervise import remove_afterwards

POLL_S = 0.25
LONGEST_TMPDIR = 50
"""Bytes of a directory in which a server's own is made."""
CAUSE = re.compile(r"(\w*(Error|Exception)|error)\b(:|$)")
"""In the line of a log that says why a program ended."""


@dataclass(frozen=True)
class Command:
    """What starts a server, again too."""

    words: tuple[str, ...]
    url: str
    log: Path
    environment: dict[str, str] = field(repr=False)
    key: str = field(repr=False)
    purpose: Purpose = ROLLOUTS


class Server:
    """One server: a process group of its own (HTTP server, scheduler, detokenizer)."""

    def __init__(self, command: Command, start: int = 0) -> None:
        self.command, self.start = command, start
        self.url, self._key = command.url, command.key
        self.answered = False
        """Whether it was healthy once."""
        self._began = time.monotonic()
        self._log_path = command.log.with_suffix(f".{start}.log") if start else command.log
        self._shared: set[str] = set()
        with writing(self._log_path):
            self._log: IO[bytes] = self._log_path.open("wb")
        self._files = private_files()
        try:
            self._process = subprocess.Popen(
                command.words,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                env=command.environment | {"TMPDIR": self._files, FILES: self._files},
                start_new_session=True,
            )
        except OSError as error:
            self._log.close()
            remove((), self._files)
            raise ConfigError(f"{command.words[0]} cannot be run: {error}; see rollout.server_python") from None

    def problem(self, start_s: float) -> str:
        """Why it must be started again, "" for a sound one and for one that is still starting."""
        try:
            if not self.answered and self._healthy():
                self.settle()
            self.check()
        except EngineUnavailableError as error:
            return str(error)
        if not self.answered and time.monotonic() > self._began + start_s:
            return self._not_healthy()
        return ""

    def wait_until_healthy(self, deadline: float) -> None:
        while not self._healthy():
            self.check()
            if time.monotonic() > deadline:
                raise EngineUnavailableError(self._not_healthy())
            time.sleep(POLL_S)
        self.settle()

    def settle(self) -> None:
        """Once it is healthy for the first time."""
        self.check()  # whoever bound the port first is healthy too
        self._shared = shared_memory(self._process.pid)
        self._freeze()

    def _freeze(self) -> None:
        """Keeps what the start has made out of the server's garbage collections.

        On a CPU every flush of its cache is a collection, two a weight sync: 0.4 s each over all that was imported,
        3 ms frozen. SGLang 0.5.23 asks itself for this at its start, at times before it listens.
        """
        with contextlib.suppress(OSError, HTTPException):  # it only saves time
            get(f"{self.url}/freeze_gc", timeout_s=5, key=self._key)

    def check(self) -> None:
        status = self._process.poll()
        if status is not None:
            noun = self.command.purpose.noun
            raise EngineUnavailableError(f"the {noun} of {self.url} exited with {status}; {self._log_tail()}")
        if self.answered and not self._listens():
            raise EngineUnavailableError(
                f"{self.url} is answered by a program that is not the server started here (process group "
                f"{self._process.pid}): something else has taken its port, and would be sent weights and prompts"
            )

    def _listens(self) -> bool:
        """Whether a process of this server's own holds the port."""
        port = urlsplit(self.url).port
        for member in group_members(self._process.pid):
            with contextlib.suppress(psutil.Error):
                sockets = psutil.Process(member).net_connections("tcp")
                if any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets):
                    return True
        return False

    def terminate(self) -> None:
        self._shared |= shared_memory(self._process.pid)
        self._process.terminate()

    def stop(self, deadline: float) -> None:
        group = self._process.pid
        while group_members(group) and time.monotonic() < deadline:
            self._process.poll()  # reaps it
            time.sleep(POLL_S)
        while group_members(group):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            time.sleep(POLL_S)
        self._process.wait()
        self._log.close()
        remove(self._shared, self._files)

    def _healthy(self) -> bool:
        try:
            get(f"{self.url}/health_generate", timeout_s=5)
        except (OSError, HTTPException):
            return False
        self.answered = True
        return True

    def _not_healthy(self) -> str:
        return f"{self.url} was not healthy within {self.command.purpose.settings}start_s; {self._log_tail()}"

    def _log_tail(self) -> str:
        return f"its log {self._log_path}: {last_words(self._log_path.read_text(errors='replace'))}"


def private_files() -> str:
    """A new directory for one server's temporary files. Its path is short: that of a UNIX socket has 107 bytes."""
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > LONGEST_TMPDIR and os.access("/tmp", os.W_OK):
        place = "/tmp"
    directory = tempfile.mkdtemp(prefix="mgspo-server-", dir=place)  # 0700
    remove_afterwards(directory)
    return directory


def last_words(log: str) -> str:
    """The line of a log that says why its program ended: the last one that names an error, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [line for line in lines if CAUSE.search(line)]
    return (causes or lines or ["(empty)"])[-1][:500]


def group_members(group: int) -> list[int]:
    """Living processes of a process group (a zombie has nothing left to stop)."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                members.append(process.pid)
        except ProcessLookupError:
            continue
    return members
