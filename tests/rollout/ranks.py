"""Trainer ranks as threads: ``Peers``' collective is a barrier over a list, and a queue carries a rank's tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Queue
from typing import Any

import torch

from megatron_gspo.sync.peers import Peers


def run_ranks(world_size: int, rank_main: Callable[[Peers], Any]) -> None:
    """Runs ``rank_main`` on every rank and raises the first rank's failure."""
    for failure in collect_failures(world_size, rank_main):
        if failure is not None:
            raise failure


def collect_failures(world_size: int, rank_main: Callable[[Peers], Any]) -> list[BaseException | None]:
    """Runs ``rank_main`` on every rank and returns what each raised."""
    barrier = threading.Barrier(world_size, timeout=60)
    mail: list[Queue[torch.Tensor]] = [Queue(maxsize=1) for _ in range(world_size)]
    slots: list[Any] = [None] * world_size
    failures: list[BaseException | None] = [None] * world_size
    sent: list[torch.Tensor] = []

    def run(rank: int) -> None:
        def all_gather(value: Any) -> list[Any]:
            slots[rank] = value
            barrier.wait()
            values = list(slots)
            barrier.wait()
            return values

        def broadcast(tensor: torch.Tensor) -> None:
            if rank == 0:
                sent[:] = [tensor]
            barrier.wait()
            if rank:
                tensor.copy_(sent[0])
            barrier.wait()

        try:
            rank_main(
                Peers(
                    rank,
                    world_size,
                    all_gather,
                    send=lambda tensor: mail[rank].put(tensor.clone()),
                    receive=lambda tensor, source: tensor.copy_(mail[source].get(timeout=60)),
                    broadcast=broadcast,
                )
            )
        except BaseException as error:
            failures[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures
