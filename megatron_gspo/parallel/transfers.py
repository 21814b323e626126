"""Whole buckets of bytes from rank to rank, beside what a step exchanges: over gloo from CPU to CPU, over nccl from GPU
to GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist


class Transfers:
    """To and from rank 0 of the world; each call is over when it returns, and may be made in a thread.

    On a GPU (not run on one yet) a call has a stream of its own. On the thread's usual one, whatever the main thread
    does next on the GPU, a gather among it, would wait for a transfer that may wait for that gather.
    """

    def __init__(self, world: dist.ProcessGroup) -> None:
        """``world``: all ranks, over gloo. Tensors of a GPU go over torch's own world, which is nccl's there."""
        self._world = world

    def send(self, tensor: torch.Tensor) -> None:
        """To rank 0."""
        self._over(tensor, lambda group: dist.send(tensor, 0, group=group))

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """From rank ``source``, on rank 0."""
        self._over(tensor, lambda group: dist.recv(tensor, source, group=group))

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's into every rank's."""
        self._over(tensor, lambda group: dist.broadcast(tensor, 0, group=group))

    def _over(self, tensor: torch.Tensor, action: Callable[[Any], object]) -> None:
        with on_own_stream(tensor.device):
            action(dist.group.WORLD if tensor.device.type == "cuda" else self._world)


@contextlib.contextmanager
def on_own_stream(device: torch.device) -> Iterator[None]:
    """Within it, work for a GPU goes to a stream of its own, and is over at the end; on a CPU nothing differs."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
        stream.synchronize()
