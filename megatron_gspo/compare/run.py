"""A comparison from its plan to its page: workers that take cells, each with a rollout server of its own."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_gspo.compare.cell import CellProcesses
from megatron_gspo.compare.plan import Cell, Plan
from megatron_gspo.config import Placement, RolloutConfig
from megatron_gspo.errors import ConfigError, MegatronGspoError
from megatron_gspo.hf.catalog import read_model
from megatron_gspo.hf.family import ModelShape
from megatron_gspo.rollout.engine import local_servers
from megatron_gspo.rollout.sglang.process import last_words
from megatron_gspo.runs.waiting import starting_servers
from megatron_gspo.storage import free_space
from megatron_gspo.train.engine_dtype import served_directory
from megatron_gspo.train.models import placed_here, served

Ended = Callable[["Outcome"], None]


@dataclass(frozen=True)
class Outcome:
    """How a cell's process ended."""

    cell: Cell
    seconds: float
    error: str = ""
    """Empty when the cell is finished."""

    def as_record(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"arm": self.cell.arm.name, "seed": self.cell.seed, "error": self.error}


@dataclass(frozen=True)
class ServerKey:
    """Cells of the same key take turns on one server."""

    shape: ModelShape
    rollout: RolloutConfig
    dtype: str
    routes: bool
    """Whether the server keeps the experts of each token."""


class Queue:
    """The cells that nobody has taken yet."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._lock = plan, threading.Lock()
        self._cells = [cell for cell in plan.cells if not cell.finished]

    def __len__(self) -> int:
        return len(self._cells)

    def take(self, server: ServerKey | None) -> Cell | None:
        """The first cell that ``server`` can serve, else the first; None when none is left."""
        with self._lock:
            fitting = (i for i, cell in enumerate(self._cells) if server and server_key(self._plan, cell) == server)
            return self._cells.pop(next(fitting, 0)) if self._cells else None

    def clear(self) -> None:
        """Leaves nothing to take."""
        with self._lock:
            self._cells.clear()


@dataclass
class Stop:
    """Whether the user asked to stop, and what has to be told."""

    asked: bool = False
    workers: list[Worker] = field(default_factory=list)

    def ask(self) -> None:
        """First: every cell finishes its outer step and saves. Again: cells are killed."""
        again, self.asked = self.asked, True
        for worker in self.workers:
            worker.stop(kill=again)


class Worker(threading.Thread):
    """Runs one cell after the other, with one set of local servers that it keeps as long as they fit.

    A cell's first weight sync replaces whatever the one before has left on them.
    """

    def __init__(
        self,
        plan: Plan,
        queue: Queue,
        processes: CellProcesses,
        stop: Stop,
        ended: Ended,
        *,
        device: str,
        urls: tuple[str, ...] = (),
        number: int = 0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(name=f"worker {number}", daemon=True)
        self.failure: Exception | None = None
        """Why this worker could not go on: no cell's fault."""
        self._plan, self._queue, self._processes, self._stopping, self._ended = plan, queue, processes, stop, ended
        self._device, self._urls, self._say = device, urls, say
        self._logs = plan.out / "servers" / f"worker-{number}"
        self._servers: Any = None
        self._serves: ServerKey | None = None
        self._placement: Placement | None = None
        self._process: Any = None

    def run(self) -> None:
        """Takes cells until none is left."""
        try:
            while not self._stopping.asked and (cell := self._queue.take(self._serves)):
                urls = self._urls or self._serve(cell)
                outcome = self._run(cell, urls, None if self._urls else self._servers.key)
                if outcome.error and self._placement is not None and self._placement.colocated:
                    self._stop_servers()  # nobody knows whether they sleep
                if not (outcome.error and self._stopping.asked):  # its end was asked for
                    self._ended(outcome)
        except Exception as error:
            if not self._stopping.asked:
                self.failure = error
            self._queue.clear()
        finally:
            self._stop_servers()

    def stop(self, *, kill: bool) -> None:
        """Ends the cell that runs now, or the start of a server. Called by another thread."""
        process, servers = self._process, self._servers
        if process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                process.kill() if kill else process.terminate()
        elif servers is not None:
            servers.stop()

    def _run(self, cell: Cell, urls: tuple[str, ...], key: str | None) -> Outcome:
        started = time.monotonic()
        self._process = process = self._processes.start(cell, urls, key, self._placement)
        if self._stopping.asked:  # meanwhile
            self.stop(kill=False)
        process.join()
        self._process = None
        status, seconds = process.exitcode, time.monotonic() - started
        assert status is not None, "it was joined"
        if status == 0 and cell.finished:
            return Outcome(cell, seconds)
        log = cell.log_file.read_text(errors="replace") if cell.log_file.is_file() else ""
        words = last_words(log) if log.strip() else f"its log is empty ({free_space(cell.log_file)})"
        why = f"ended by signal {-status}" if status < 0 and not self._stopping.asked else words
        if status == 0:  # and not finished
            why = "its process ended before it was done: the reward function, or a C library, called _exit"
        return Outcome(cell, seconds, f"{why.removeprefix('error: ')} (exit status {status}; {cell.log_file})")

    def _serve(self, cell: Cell) -> tuple[str, ...]:
        """URLs of local servers for the cell: those that run, if they fit and live."""
        key = server_key(self._plan, cell)
        if self._servers is not None and key == self._serves:
            with contextlib.suppress(MegatronGspoError):
                self._servers.check()
                return tuple(self._servers.urls)
        self._stop_servers()
        config = cell.config
        self._placement = placed_here(config, ranks=config.parallel.world_size(), cores=1)  # cells share the cores
        rollout = served(config, self._placement)
        self._servers = local_servers(rollout)(
            rollout,
            served_directory(rollout, cell.cold_start, self._logs, self._placement.sizes),
            self._logs,
            device=self._device,
            dtype=key.dtype,
            routes=key.routes,
            placement=self._placement,
        )
        with starting_servers(rollout, self._device, self._say):
            self._servers.__enter__()
        self._serves = key
        return tuple(self._servers.urls)

    def _stop_servers(self) -> None:
        if self._servers is not None:
            self._servers.stop()
        self._servers = self._serves = None


def server_key(plan: Plan, cell: Cell) -> ServerKey:
    """What the cell's server is started with. One that can give routes serves all arms of a mixture of experts: it is
    not started again for the next arm, and all arms take their time from the same server."""
    config, shape = cell.config, _shape(cell.cold_start)
    routes = bool(shape.num_experts) and any(other.config.replay.uses_engine_routes for other in plan.cells)
    return ServerKey(shape, config.rollout, config.rollout.engine_dtype or config.model.dtype, routes)


@functools.cache
def _shape(directory: str) -> ModelShape:
    return read_model(directory)[1]


def run_plan(
    plan: Plan, jobs: int, device: str, ended: Ended, stop: Stop, say: Callable[[str], None] = lambda text: None
) -> None:
    """Runs every cell that is not finished, ``jobs`` at a time; ``ended`` hears of each, ``say`` of servers that start.

    Raises what kept a worker from going on, such as a server that does not start.
    """
    queue = Queue(plan)
    if not queue:
        return
    processes, servers = CellProcesses(device), plan.base.rollout.servers
    for number in range(min(jobs, len(queue))):
        urls = servers[number::jobs]
        worker = Worker(plan, queue, processes, stop, ended, device=device, urls=urls, number=number, say=say)
        stop.workers.append(worker)
    for worker in stop.workers:
        worker.start()
    for worker in stop.workers:
        while worker.is_alive():
            worker.join(timeout=0.2)  # so that Python runs signal handlers meanwhile
    for worker in stop.workers:
        if worker.failure is not None:
            raise worker.failure


def choose_jobs(asked: int | None, plan: Plan, device: str) -> int:
    """Cells at a time: as asked, else as many as this machine's cores hold ranks. Raises ConfigError."""
    servers, ranks = plan.base.rollout.servers, max(cell.config.parallel.world_size() for cell in plan.cells)
    if asked is not None and asked < 1:
        raise ConfigError(f"--jobs {asked}: one cell at a time at least")
    if device == "cuda" and (asked or 1) > 1:
        raise ConfigError(f"--jobs {asked}: on GPUs cells run one at a time, each with all the ranks of its layout")
    if servers and (asked or 1) > len(servers):
        raise ConfigError(f"--jobs {asked}: each needs a server of its own, and rollout.servers has {len(servers)}")
    if asked is not None:
        return asked
    cores = 1 if device == "cuda" else len(os.sched_getaffinity(0)) // ranks
    return max(1, min(cores, len(servers)) if servers else cores)


@contextlib.contextmanager
def stopping_on_signals(stop: Stop, say: Callable[[str], None]) -> Iterator[None]:
    """Within it, SIGINT and SIGTERM ask to stop; a second one kills what still runs."""
    import signal

    def ask(number: int, frame: object) -> None:
        say("killing the cells that run" if stop.asked else "stopping: the cells that run finish their outer step")
        stop.ask()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
