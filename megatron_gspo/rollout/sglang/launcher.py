"""SGLang servers on this machine, started with a run and gone with it."""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import time
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from megatron_gspo.config import Placement, PlacementConfig, RolloutConfig
from megatron_gspo.errors import ConfigError, DependencyError, EngineUnavailableError
from megatron_gspo.rollout.sglang.arguments import LOOPBACK, Device, server_arguments, server_environment
from megatron_gspo.rollout.sglang.cards import cards_here, check_cards, check_placement
from megatron_gspo.rollout.sglang.probe import KEY_FILE
from megatron_gspo.rollout.sglang.process import Command, Server
from megatron_gspo.rollout.sglang.purpose import ROLLOUTS, Purpose
from megatron_gspo.storage import writing

SERVER_PYTHON = "MEGATRON_GSPO_SGLANG_PYTHON"
SERVER_SCRIPT = Path(__file__).with_name("server.py")
GRACE_S = {"cpu": 1.0, "cuda": 30.0}
"""Seconds between asking servers to stop and killing them. SGLang takes 10 to stop by itself, which a CPU server has no
reason to; a scheduler that is killed while it holds device memory may leave it held."""


class LocalServers:
    """Starts the servers of ``placement``, waits until all are healthy, and stops them on exit. Without a placement
    they are as many as the configuration says or the cards hold, on a machine where no rank trains.

    A server also ends by itself, within a second, when this process is gone (even killed). ``urls`` is set on entry;
    logs go to ``log_dir/sglang-0.log`` and so on (``sglang-0.1.log`` once it was started again, by ``mend``). They
    answer only requests with ``key``, but for questions after their health: a random one unless it is given ("" asks
    for none). It lies in ``log_dir/key`` meanwhile, for this user's eyes alone. They listen on ``host`` alone, at ports
    from ``port`` on, or free ones. ``purpose``: what they serve, responses of a policy unless another is given.

    Raises DependencyError without an environment that holds sglang, EngineUnavailableError with what the log says of it
    when a server dies or is not healthy in time.
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
        purpose: Purpose = ROLLOUTS,
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
        self._host, self._port, self._purpose = host, port, purpose
        self._servers: list[Server] = []
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
                    purpose=self._purpose,
                )
                command = Command(
                    (str(python), "-P", str(SERVER_SCRIPT), *arguments),  # -P: its directory's modules are not its own
                    f"http://{f'[{host}]' if ':' in host else host}:{port}",
                    self._log_dir / f"sglang-{index}.log",
                    server_environment(os.environ, self._device, self.key, sleeps=placement.colocated, host=host),
                    self.key,
                    self._purpose,
                )
                self._servers.append(Server(command))
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
        check_placement(placement, self._model_path, self._dtype, cards, self._purpose)
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
            spent = (
                f"{self._purpose.settings}restarts = {most}"
                if self.restarts >= most
                else "another program has its port now"
            )
            self.said.append(f"warning: {why}; it stays away: {spent}")
            return
        self.restarts += 1
        self.said.append(f"{why}; it is started again ({self.restarts} of {most} times)")
        self._servers[index] = Server(server.command, start=server.start + 1)

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
