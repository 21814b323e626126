"""Gloo ranks for every distributed test.

Importing Megatron costs seconds of CPU a process, so ranks are forked from one server that has imported it; a call
costs tens of milliseconds a rank. They end with the call: gloo keeps a thread for every group that was ever made in a
process, and threads of groups whose peers are gone spin.
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

PRELOAD = ["megatron_gspo.runs.loop", "transformers.models.auto.tokenization_auto", "tests.pool"]


DEVICE = "RANKS_ON"
"""Environment variable: "card" has ranks compute on the second device of ``tests.card``, where mixing it with the host
raises."""
DIED = "the process died"


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


class RankPool:
    """``run(world, function, *args)`` calls a module-level function on ``world`` ranks and returns their results."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def run(self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
        """Results in rank order. Raises RankError with the traceback of the first rank that fails."""
        with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
            ranks = [self._start(rank, world, f"{directory}/store", function, args) for rank in range(world)]
            try:
                return _collect([connection for _, connection in ranks], timeout)
            finally:
                for process, connection in ranks:
                    connection.close()
                    process.kill()
                    process.join()

    def _start(
        self, rank: int, world: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
    ) -> tuple[mp.process.BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, rank, world, store, function, args))
        process.start()
        theirs.close()
        return process, ours


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = {rank: connection for rank, connection in enumerate(connections) if rank not in results}
        ready = wait(list(waiting.values()), timeout)
        if not ready:
            raise RankError(f"ranks {sorted(waiting)} gave no answer within {timeout:g} s")
        for rank in [rank for rank, connection in waiting.items() if connection in ready]:
            ok, value = _answer(waiting.pop(rank))
            if not ok and "by peer" in value:  # whose? A rank that was killed can be heard after its peers
                wait(list(waiting.values()), 10.0)
                dead = [other for other, connection in waiting.items() if _has_died(connection)]
                rank, value = (dead[0], DIED) if dead else (rank, value)
            if not ok:
                raise RankError(f"rank {rank}: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _answer(connection: Connection) -> tuple[bool, Any]:
    try:
        answer: tuple[bool, Any] = connection.recv()
        return answer
    except EOFError:
        return False, DIED


def _has_died(connection: Connection) -> bool:
    return connection.poll() and _answer(connection) == (False, DIED)


def _serve(
    connection: Connection, rank: int, world: int, store: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    from megatron_gspo.megatron import cpu
    from tests import card

    torch.set_num_threads(1)
    cpu.install()
    if os.environ.get(DEVICE) == "card":
        card.install()
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
    connection.send(result)
    connection.poll(timeout=600)  # other ranks may still need this one's sockets: the end comes from outside
