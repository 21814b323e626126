"""The servers of a disturbed run: each behind a link that can be cut, and started again when it was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_gspo.config import RolloutConfig
from megatron_gspo.rollout.sglang.launcher import LocalServers
from tests.chaos.link import Link

ENGINE = Path(__file__).with_name("engine.py")


class Servers:
    """Servers by number, each behind its link. Subclasses say what one is."""

    def __init__(self, count: int) -> None:
        self.links = [Link() for _ in range(count)]

    @property
    def urls(self) -> list[str]:
        """That a trainer asks."""
        return [link.url for link in self.links]

    def count(self, *paths: str) -> int:
        """Requests to these paths until now."""
        return sum(link.count(*paths) for link in self.links)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """All of them are there, as long as the block lasts."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.end)
            for number, link in enumerate(self.links):
                stack.enter_context(link)
                self.start(number)
            yield

    def kill(self, number: int) -> None:
        """Ends one, and starts another in its place, without weights."""
        self.signal(number, signal.SIGKILL)
        self.start(number)

    def signal(self, number: int, what: signal.Signals) -> None:
        """Sends a signal to one."""
        raise NotImplementedError

    def start(self, number: int) -> None:
        """Starts one, in the place of the one before."""
        raise NotImplementedError

    def end(self) -> None:
        """Ends all."""
        raise NotImplementedError


class StandIns(Servers):
    """Processes of ``engine.py``, there again at once."""

    def __init__(self, model: Path, count: int) -> None:
        super().__init__(count)
        self._model = model
        self._processes: list[subprocess.Popen[str] | None] = [None] * count

    def signal(self, number: int, what: signal.Signals) -> None:
        """Sends a signal to one."""
        process = self._processes[number]
        assert process is not None
        os.kill(process.pid, what)

    def start(self, number: int) -> None:
        """Starts one, in the place of the one before."""
        if (before := self._processes[number]) is not None:
            before.wait()
            assert before.stdout is not None
            before.stdout.close()
        process = subprocess.Popen(
            [sys.executable, "-S", str(ENGINE), str(self._model)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # connections that were cut
            text=True,
        )
        assert process.stdout is not None
        self._processes[number] = process
        self.links[number].target = int(process.stdout.readline())

    def end(self) -> None:
        """Ends all."""
        for process in filter(None, self._processes):
            process.kill()
            process.communicate()


class RealServers(Servers):
    """SGLang's. One takes a minute to come back on a CPU."""

    def __init__(self, model: Path, count: int, logs: Path) -> None:
        super().__init__(count)
        self._model, self._logs = model, logs
        self._servers: list[LocalServers | None] = [None] * count

    def signal(self, number: int, what: signal.Signals) -> None:
        """Sends a signal to all processes of one."""
        servers = self._servers[number]
        assert servers is not None
        for server in servers._servers:
            os.killpg(server._process.pid, what)

    def start(self, number: int) -> None:
        """Starts one, in the place of the one before."""
        if (before := self._servers[number]) is not None:
            before.stop()
        config = RolloutConfig(max_prompt_tokens=13, max_response_tokens=16, local_servers=1)
        logs = self._logs / str(number)
        started = LocalServers(config, self._model, logs, device="cpu", dtype="float32", routes=True, key="")
        self._servers[number] = started.__enter__()
        self.links[number].target = int(started.urls[0].rpartition(":")[2])

    def end(self) -> None:
        """Ends all."""
        for servers in filter(None, self._servers):
            servers.stop()
