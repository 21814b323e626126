"""Ranks of this machine for as many layouts as come, each from fresh processes.

Importing Megatron costs seconds of CPU a process, so on a CPU ranks are forked from one server that has imported it: a
rank then starts in tens of milliseconds. They end with the call: gloo keeps a thread for every group that was ever made
in a process. With CUDA, which does not survive a fork, they are spawned.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_gspo.errors import MegatronGspoError
from megatron_gspo.parallel.rendezvous import INTERFACES
from megatron_gspo.quiet import ENVIRONMENT, mute

PRELOAD = [
    "megatron_gspo.parity.independent",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "transformers.models.qwen3.modeling_qwen3",
    "megatron_gspo.parity.ranks",
]
COLLECTIVE_S = 600
"""Seconds that a collective may take."""


class RankError(MegatronGspoError, RuntimeError):
    """A rank raised or died; the message ends in its traceback."""


class LocalRanks:
    """``run(world, function, *args)`` calls a module-level function on ``world`` ranks and returns their results."""

    is_first = True
    """Whether this process prints."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._context: Any = mp.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            self._context.set_forkserver_preload(PRELOAD)
            with _environment(device):
                forkserver.ensure_running()  # it imports while this process does something else

    def refusal(self, ranks: int) -> str:
        """Why a layout of so many ranks cannot run; empty when it can."""
        if self.device == "cpu":
            return ""
        import torch

        devices = torch.cuda.device_count()
        return "" if ranks <= devices else f"needs {ranks} GPUs, and this machine has {devices}"

    def once(self, function: Callable[..., Any], *args: Any) -> Any:
        """Calls ``function`` on a world of one rank."""
        return self.run(1, function, *args)[0]

    @contextmanager
    def directory(self) -> Iterator[str]:
        """A directory for files that all ranks read."""
        with tempfile.TemporaryDirectory(prefix="megatron-gspo-parity-") as path:
            yield path

    def share(self, directory: str) -> None:
        """Nothing: all ranks see it."""

    def leave(self) -> None:
        """Nothing: no other process is waiting."""

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 3600.0) -> list[Any]:
        """Results in rank order. Raises RankError with the traceback of the first rank that fails."""
        with tempfile.TemporaryDirectory(prefix="mgspo-parity-") as directory, _environment(self.device):
            ranks = [self._start(rank, world, f"{directory}/store", function, args) for rank in range(world)]
            try:
                return _collect([connection for _, connection in ranks], timeout_s)
            finally:
                for process, connection in ranks:
                    connection.close()
                    process.kill()
                    process.join()

    def _start(
        self, rank: int, world: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self.device, rank, world, store, function, args), daemon=True
        )
        process.start()
        theirs.close()
        return process, ours


@contextmanager
def _environment(device: str) -> Iterator[None]:
    """What a started process finds, and this one only within: no remarks at imports, a thread, loopback, the device."""
    settings = ENVIRONMENT | {"OMP_NUM_THREADS": "1"} | dict.fromkeys(INTERFACES, "lo")
    settings |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _collect(connections: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        rank_of = {connection: rank for rank, connection in enumerate(connections) if rank not in results}
        ready = wait(list(rank_of), timeout_s)
        if not ready:
            raise RankError(f"ranks {sorted(rank_of.values())} gave no answer within {timeout_s:g} s")
        for connection in ready:
            rank = rank_of[connection]  # type: ignore[index]
            try:
                ok, value = connection.recv()  # type: ignore[union-attr, call-arg]
            except EOFError:
                ok, value = False, "the process died"
            if isinstance(value, MegatronGspoError):
                raise value
            if not ok:
                raise RankError(f"rank {rank}: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _serve(
    connection: Connection,
    device: str,
    rank: int,
    world: int,
    store: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    mute()
    import torch
    import torch.distributed as dist

    from megatron_gspo.platforms import PLATFORMS

    torch.set_num_threads(1)
    platform = PLATFORMS[device]
    if platform.one_rank_a_device:
        torch.cuda.set_device(rank)
    try:
        dist.init_process_group(
            platform.backend,
            init_method=f"file://{store}",
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )
        result: tuple[bool, Any] = (True, function(*args))
    except MegatronGspoError as error:
        result = (False, error)
    except BaseException:
        result = (False, traceback.format_exc())
    connection.send(result)
    connection.poll(timeout=600)  # other ranks may still need this one's sockets: the end comes from outside
