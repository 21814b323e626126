"""SGLang servers on this machine, started with a run and gone with it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

import psutil

from megatron_gspo.config import Placement, PlacementConfig, RolloutConfig
from megatron_gspo.errors import ConfigError, DependencyError, EngineUnavailableError
from megatron_gspo.rollout.sglang.arguments import LOOPBACK, Device, server_arguments, server_environment
from megatron_gspo.rollout.sglang.cards import cards_here, check_cards, check_placement
from megatron_gspo.rollout.sglang.probe import KEY_FILE, get
from megatron_gspo.rollout.sglang.server import FILES, remove, shared_memory
from megatron_gspo.storage import writing
from megatron_gspo.supervise import remove_afterwards

SERVER_PYTHON = "MEGATRON_GSPO_SGLANG_PYTHON"
SERVER_SCRIPT = Path(__file__).with_name("server.py")
GRACE_S = {"cpu": 1.0, "cuda": 30.0}
"""Seconds between asking servers to stop and killing them. SGLang takes 10 to stop by itself, which a CPU server has no
reason to; a scheduler that is killed while it holds device memory may leave it held."""
POLL_S = 0.25
LONGEST_TMPDIR = 50
"""Bytes of a directory in which a server's own is made."""
CAUSE = re.compile(r"(\w*(Error|Exception)|error)\b(:|$)")
"""In the line of a log that says why a program ended."""


class LocalServers:
    """Starts the servers of ``placement``, waits until all are healthy, and stops them on exit. Without a placement
    they are as many as the configuration says or the cards hold, on a machine where no rank trains.

    A server also ends by itself, within a second, when this process is gone (even killed). ``urls`` is set on entry;
    logs go to ``log_dir/sglang-0.log`` and so on (``sglang-0.1.log`` once it was started again, by ``mend``). They
    answer only requests with ``key``, but for questions after their health: a random one unless it is given ("" asks
    for none). It lies in ``log_dir/key`` meanwhile, for this user's eyes alone. They listen on ``host`` alone, at ports
    from ``port`` on, or free ones. Raises DependencyError without an environment that holds sglang,
    EngineUnavailableError with what the log says of it when a server dies or is not healthy in time.
    """

    def __init__(
        self,
        config: RolloutConfig,
        model_path: str | Path,
        log_dir: str | Path,
        *,
        device: Device,
        dtype: str,
        seed: int = 0,
        routes: bool = False,
        key: str | None = None,
        placement: Placement | None = None,
        host: str = LOOPBACK,
        port: int | None = None,
    ) -> None:
        self.urls: tuple[str, ...] = ()
        self.key = secrets.token_urlsafe(32) if key is None else key
        self._config = config
        self._placement = placement
        self._model_path = Path(model_path)
        self._log_dir = Path(log_dir)
        self._device: Device = device
        self._dtype = dtype
        self._seed = seed
        self._routes = routes
        self._host, self._port = host, port
        self._servers: list[_Server] = []
        self.restarts = 0
        """How often a server was started again."""
        self.said: list[str] = []
        """What there is to say of it, in lines; whoever has said it clears them."""
        self._given_up: set[str] = set()

    def __enter__(self) -> Self:
        python = find_server_python(self._config.server_python)
        placement = self._placed()
        gpus, host, first = placement.first_cards, self._host, self._port
        ports = free_ports(len(gpus), host) if first is None else range(first, first + len(gpus))
        with writing(self._log_dir):
            self._log_dir.mkdir(parents=True, exist_ok=True)
            write_key(self._log_dir / KEY_FILE, self.key)
        try:
            for index, (port, gpu) in enumerate(zip(ports, gpus, strict=True)):
                arguments = server_arguments(
                    self._config,
                    self._model_path,
                    port,
                    device=self._device,
                    dtype=self._dtype,
                    seed=self._seed + index,
                    gpu=gpu,
                    host=host,
                    routes=self._routes,
                    placed=placement.server_args,
                )
                command = _Command(
                    (str(python), "-P", str(SERVER_SCRIPT), *arguments),  # -P: its directory's modules are not its own
                    f"http://{f'[{host}]' if ':' in host else host}:{port}",
                    self._log_dir / f"sglang-{index}.log",
                    server_environment(os.environ, self._device, self.key, sleeps=placement.colocated, host=host),
                    self.key,
                )
                self._servers.append(_Server(command))
            deadline = time.monotonic() + self._config.server_start_s
            for server in self._servers:
                server.wait_until_healthy(deadline)
        except BaseException:
            self.stop()
            raise
        self.urls = tuple(server.url for server in self._servers)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _placed(self) -> Placement:
        """Where they lie. Raises ConfigError for what neither the model nor the cards allow."""
        cards = cards_here() if self._device == "cuda" else []
        placement = self._placement or PlacementConfig().resolved(
            self._config, ranks=0, cards=len(cards), cpu_servers=self._config.local_servers or 1
        )
        if cards:
            check_cards(self._dtype)
        check_placement(placement, self._model_path, self._dtype, cards)
        return placement

    def check(self) -> None:
        """Raises EngineUnavailableError when a server has died, or its port is another program's."""
        for server in self._servers:
            server.check()

    def mend(self, silent: Collection[str] = ()) -> dict[str, str]:
        """Starts servers again that have died, or are ``silent``, ``rollout.server_restarts`` times in all, and waits
        for none of them. URL -> why, of those that cannot be asked for anything now."""
        found: dict[str, str] = {}
        for index, server in enumerate(self._servers):
            why = server.problem(self._config.server_start_s)
            if not why and server.answered and server.url in silent:
                why = f"{server.url} runs, and generates nothing"
            if why:
                found[server.url] = why
                self._start_again(index, why)
            elif not server.answered:
                found[server.url] = f"{server.url} is being started again"
        return found

    def _start_again(self, index: int, why: str) -> None:
        server = self._servers[index]
        if server.url in self._given_up:
            return
        server.terminate()
        server.stop(time.monotonic() + GRACE_S[self._device])
        most = self._config.server_restarts
        if self.restarts >= most or not is_free(server.url):
            self._given_up.add(server.url)
            spent = f"rollout.server_restarts = {most}" if self.restarts >= most else "another program has its port now"
            self.said.append(f"warning: {why}; it stays away: {spent}")
            return
        self.restarts += 1
        self.said.append(f"{why}; it is started again ({self.restarts} of {most} times)")
        self._servers[index] = _Server(server.command, start=server.start + 1)

    def stop(self) -> None:
        """Ends every process of every server: asks, waits ``GRACE_S``, kills. Safe to call again."""
        for server in self._servers:
            server.terminate()
        deadline = time.monotonic() + GRACE_S[self._device]
        for server in self._servers:
            server.stop(deadline)
        self._servers.clear()
        with contextlib.suppress(OSError):
            (self._log_dir / KEY_FILE).unlink(missing_ok=True)


@dataclass(frozen=True)
class _Command:
    """What starts a server, again too."""

    words: tuple[str, ...]
    url: str
    log: Path
    environment: dict[str, str] = field(repr=False)
    key: str = field(repr=False)


class _Server:
    """One server: a process group of its own (HTTP server, scheduler, detokenizer)."""

    def __init__(self, command: _Command, start: int = 0) -> None:
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
            return f"{self.url} was not healthy within rollout.server_start_s; {self._log_tail()}"
        return ""

    def wait_until_healthy(self, deadline: float) -> None:
        while not self._healthy():
            self.check()
            if time.monotonic() > deadline:
                raise EngineUnavailableError(
                    f"{self.url} was not healthy within rollout.server_start_s; {self._log_tail()}"
                )
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
            raise EngineUnavailableError(f"the rollout server of {self.url} exited with {status}; {self._log_tail()}")
        if self.answered and not self._listens():
            raise EngineUnavailableError(
                f"{self.url} is answered by a program that is not the server started here (process group "
                f"{self._process.pid}): something else has taken its port, and would be sent weights and prompts"
            )

    def _listens(self) -> bool:
        """Whether a process of this server's own holds the port."""
        port = urlsplit(self.url).port
        for member in _group_members(self._process.pid):
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
        while _group_members(group) and time.monotonic() < deadline:
            self._process.poll()  # reaps it
            time.sleep(POLL_S)
        while _group_members(group):
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


def write_key(path: Path, key: str) -> None:
    """Puts the key where ``status`` finds it, in a file that no other user can read."""
    path.unlink(missing_ok=True)  # of servers that were killed
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(key)


def find_server_python(configured: str = "") -> Path:
    """The Python that holds sglang: the setting, the environment variable, or ``.venv-sglang`` here or in the checkout.

    Raises ConfigError when a named one does not exist, DependencyError when none is found.
    """
    for source, value in (("rollout.server_python", configured), (f"${SERVER_PYTHON}", os.environ.get(SERVER_PYTHON))):
        if value:
            if not Path(value).is_file():
                raise ConfigError(f"{source} = {value}: no such file; it is the Python of the environment with sglang")
            return Path(value)
    checkout = Path(__file__).resolve().parents[3]
    candidates = [root / ".venv-sglang" / "bin" / "python" for root in (Path.cwd(), checkout)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise DependencyError(
        f"no environment with sglang at {' or '.join(map(str, dict.fromkeys(candidates)))}: run `make install` in the "
        f"checkout, set rollout.server_python or ${SERVER_PYTHON}, or name running servers in rollout.servers"
    )


def free_ports(count: int, host: str = LOOPBACK) -> list[int]:
    """Distinct free ports below the usual ephemeral range: a server binds its port only after some 20 seconds, and no
    outgoing connection may take it meanwhile."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20000, 32000), 200):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise EngineUnavailableError(f"found {len(ports)} of {count} free ports in 20000-31999 on {host}")


def is_free(url: str) -> bool:
    """Whether nobody holds the port of a local URL, as far as one can tell by taking it."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of those that were closed just now
        try:
            probe.bind((urlsplit(url).hostname, urlsplit(url).port or 0))
        except OSError:
            return False
    return True


def last_words(log: str) -> str:
    """The line of a log that says why its program ended: the last one that names an error, else the last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [line for line in lines if CAUSE.search(line)]
    return (causes or lines or ["(empty)"])[-1][:500]


def _group_members(group: int) -> list[int]:
    """Living processes of a process group (a zombie has nothing left to stop)."""
    members = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                members.append(process.pid)
        except ProcessLookupError:
            continue
    return members
