"""The process group that the first trainer rank shares with the rollout servers."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public, but not marked so

from megatron_gspo.calls import start
from megatron_gspo.errors import NoAnswerError, SyncError
from megatron_gspo.parallel.rendezvous import listening_store
from megatron_gspo.parallel.transfers import on_own_stream
from megatron_gspo.rollout.engine import Control
from megatron_gspo.sync.backend import Backend, this_card
from megatron_gspo.sync.flat import HOST, FlatBucket, settle

JOIN_S = 60.0
"""Seconds in which every server must have joined."""
GRACE_S = 10.0
"""Seconds that what is under way gets to end after a failure, before it is left to its own timeout."""

WATCHDOG = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
"""Environment variable that a nccl group reads when it is made."""


class ServerGroup:
    """This process as rank 0, and behind it every tensor-parallel rank of every server in turn.

    It is no part of torch's world, which its members do not share. A server joins as torch makes a group, under
    torch's prefixes in the store, which ``_join`` repeats (SGLang 0.5.23, srt/utils/common.py).
    """

    def __init__(self, servers: Control, *, backend: Backend, timeout_s: float) -> None:
        """Joins with every server. Raises SyncError naming the one that does not."""
        self._servers = servers
        self.backend = backend
        self._timeout_s = timeout_s
        self._join_s = min(JOIN_S, timeout_s)
        self._group: Any = None
        self._device = device_of(backend)
        ranks = servers.tensor_ranks()
        self._world_size = 1 + sum(ranks)
        address = reachable_address(servers.urls)
        self._address = address
        self._store = listening_store(address, self._world_size, timedelta(seconds=self._join_s))
        self._name = f"megatron-gspo-{self._store.port}"
        joining = start(self._join)
        posts = servers.join(self._name, address, self._store.port, self._world_size, backend)
        self._all_or_none(posts, joining, self._join_s)
        self._group = joining.result()

    def broadcast(self, bucket: FlatBucket) -> None:
        """Puts a bucket's tensors into every server's model. Raises SyncError naming the server that failed.

        Afterwards the group is of no use: ``close`` it.
        """
        data = bucket.data.to(self._device)
        posts = self._servers.receive(self._name, bucket.layout, patience_s=3 * GRACE_S)
        self._all_or_none(posts, start(lambda: self._send(data)), self._timeout_s)

    def close(self) -> None:
        """Takes the servers out of the group and frees it."""
        wait(self._leave(), timeout=GRACE_S)
        self._free()

    def _free(self) -> None:
        """Ends our part of the group. A broadcast over nccl, whose kernel spins for a peer that is gone, ends with it;
        over gloo it ends by itself when the connections do. (nccl: not run on a GPU yet.)"""
        group, self._group = self._group, None
        if self.backend == "nccl" and group is not None:
            wait([start(group.abort)], timeout=GRACE_S)

    def _join(self) -> Any:
        timeout = timedelta(seconds=self._join_s)
        store = PrefixStore(f"{self._name}/", PrefixStore(self._name, self._store))
        if self.backend == "gloo":
            gloo: Any = dist.ProcessGroupGloo
            options = gloo._Options()
            options._timeout = timeout
            options._devices = [gloo.create_device(hostname=self._address)]
            return gloo(PrefixStore("cpu/", store), 0, self._world_size, options)
        nccl_options = dist.ProcessGroupNCCL.Options()
        # Of each broadcast: nccl looks at the group's timeout alone. Ours comes first, and names who failed.
        nccl_options._timeout = timedelta(seconds=self._timeout_s + 6 * GRACE_S)
        with watchdog_that_spares_the_process():
            return dist.ProcessGroupNCCL(PrefixStore("cuda/", store), 0, self._world_size, nccl_options)

    def _send(self, data: torch.Tensor) -> None:
        """In a thread of its own, which has a GPU's streams of its own too: nothing else waits for a server."""
        with on_own_stream(self._device):
            self._broadcast(data)

    def _broadcast(self, data: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = timedelta(seconds=self._timeout_s)
        self._group.broadcast([data], options).wait()
        if self.backend == "nccl":
            drain(self._device)

    def _all_or_none(self, posts: list[Future[str]], transfer: Future[Any], timeout_s: float) -> None:
        """Waits ``timeout_s`` for the servers' answers and for our own part; raises for what failed first.

        A broadcast cannot be called off. It ends when a server that refused it leaves the group, or has died; then the
        others' end with our connections.
        """
        parts: list[Future[Any]] = [*posts, transfer]
        _, pending = wait(parts, timeout=timeout_s, return_when=FIRST_EXCEPTION)
        if not pending and all(part.exception() is None for part in parts):
            return
        refused = [str(post.exception()) for post in posts if post.done() and post.exception()]
        leaving = self._leave()
        wait([transfer], timeout=GRACE_S)
        failure = transfer.exception() if transfer.done() else f"not over after {timeout_s:g} s"
        self._free()
        wait([transfer], timeout=GRACE_S)  # nothing reads its memory any more when this returns
        wait([*leaving, *posts], timeout=GRACE_S)
        causes = self._gone(posts, timeout_s) or refused or [f"broadcast to {', '.join(self._servers.urls)}: {failure}"]
        raise SyncError("; ".join(causes))

    def _gone(self, posts: list[Future[str]], timeout_s: float) -> list[str]:
        """What to say of servers that do not answer. When one is gone, others refuse what they could not receive."""
        gone = []
        for url, post in zip(self._servers.urls, posts, strict=True):
            if not post.done():
                gone.append(f"{url} did not answer within {timeout_s:g} s")
            elif isinstance(error := post.exception(), NoAnswerError):
                gone.append(str(error))
        return gone

    def _leave(self) -> list[Future[str]]:
        return self._servers.leave(self._name)


def device_of(backend: Backend) -> torch.device:
    """Where what is broadcast lies."""
    return this_card() if backend == "nccl" else HOST


def drain(device: torch.device) -> None:
    """Waits for what was given to a GPU: over nccl a broadcast's own ``wait`` ends before it is over."""
    settle(device)


@contextlib.contextmanager
def watchdog_that_spares_the_process() -> Iterator[None]:
    """Within it, a nccl group is made whose watchdog, when a broadcast fails, aborts the group's communicator (2) and
    does not end the process (3, torch's default): who failed is said by ``ServerGroup``, on every rank."""
    before = os.environ.get(WATCHDOG)
    os.environ[WATCHDOG] = "2"
    try:
        yield
    finally:
        if before is None:
            del os.environ[WATCHDOG]
        else:
            os.environ[WATCHDOG] = before


def reachable_address(urls: Sequence[str]) -> str:
    """This machine's address as the servers see it: that of the interface which leads to the first one elsewhere."""
    for url in urls:
        host = urlsplit(url).hostname or ""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
            probe.connect((host, 9))  # of a datagram socket: nothing is sent
            address = str(probe.getsockname()[0])
            if not address.startswith("127."):
                return address
    return "127.0.0.1"
