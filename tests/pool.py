"""One pool of gloo ranks for every distributed test.

Importing Megatron costs seconds of CPU a process, so the ranks are forked from one server that has imported it, live
for the whole session, and join a fresh world of any size up to ``RANKS`` for each call.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

RANKS = 8


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """``run(world, function, *args)`` calls a module-level function on ``world`` ranks and returns their results."""

    def __init__(self) -> None:
        self._ranks: list[tuple[mp.process.BaseProcess, Connection]] = []
        self._calls = 0
        self._directory = tempfile.TemporaryDirectory(prefix="rank-pool-")

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Results in rank order. Raises RankError with the first rank's traceback; the pool starts anew after one."""
        self._start()
        self._calls += 1
        store = os.path.join(self._directory.name, f"store-{self._calls}")
        connections = [connection for _, connection in self._ranks[:world]]
        for rank, connection in enumerate(connections):
            connection.send((function, args, rank, world, store))
        results: dict[int, Any] = {}
        while len(results) < world:
            waiting = {connection: rank for rank, connection in enumerate(connections) if rank not in results}
            ready = wait(list(waiting), timeout)
            if not ready:
                self.close()
                raise RankError(f"ranks {sorted(waiting.values())} gave no answer within {timeout:g} s")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                try:
                    ok, value = connection.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank}: {value}")
                results[rank] = value
        return [results[rank] for rank in range(world)]

    def close(self) -> None:
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        if self._ranks:
            return
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["megatron_gspo.policy.policy", "tests.pool"])
        for _ in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def _serve(connection: Connection) -> None:
    import torch
    import torch.distributed as dist

    from megatron_gspo.policy import cpu

    torch.set_num_threads(1)
    cpu.install()
    while True:
        try:
            function, args, rank, world, store = connection.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=120),
            )
            result = (True, function(*args))
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            _leave()
        connection.send(result)


def _leave() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
