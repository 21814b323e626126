"""Weight sync over a process group that rank 0 shares with the servers."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from megatron_gspo.calls import start
from megatron_gspo.errors import SyncError
from megatron_gspo.sync.backend import Backend, choose, trainer_cards
from megatron_gspo.sync.background import Pump
from megatron_gspo.sync.base import BucketSync, NamedTensor, Names
from megatron_gspo.sync.flat import Buffers, FlatBucket, flatten, receive_bucket, receive_header, send_bucket
from megatron_gspo.sync.group import ServerGroup


class DistributedSync(BucketSync):
    """Every owner hands its buckets to rank 0, which broadcasts them to the servers.

    Three things go on at once: this rank's next bucket is gathered, its last one is on its way to rank 0, and rank 0
    broadcasts the one before. Rank 0 takes the next bucket from whichever owner has one. A fixed order would deadlock:
    the owner whose turn it is may be in a gather with another that waits to be asked.
    """

    _pump: Pump[FlatBucket]
    _receivers: list[Future[None]]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group: ServerGroup | None = None
        self._buffers = Buffers()

    def close(self) -> None:
        """Leaves the groups."""
        self._buffers = Buffers()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _begin(self) -> str:
        if self._group is None:
            self._group = ServerGroup(self.servers, backend=self._backend(), timeout_s=self.config.timeout_s)
        self.servers.begin_update()
        return ""

    def _open(self) -> None:
        if not self.peers.lead:
            self._pump = Pump(functools.partial(self._pass_on, functools.partial(send_bucket, self.peers.send)))
            return
        assert self._group is not None, "the group is joined in _begin"
        self._pump = Pump(functools.partial(self._pass_on, self._group.broadcast))
        hand = threading.Lock()
        self._receivers = [
            start(functools.partial(self._receive_all, rank, hand)) for rank in range(1, self.peers.world_size)
        ]

    def _send(self, place: str, bucket: list[NamedTensor]) -> None:  # type: ignore[override]  # nothing to report
        self._pump.put(flatten(bucket, self._buffers))

    def _flush(self) -> None:
        if self.peers.lead:
            failures = [error for receiver in self._receivers if (error := receiver.exception()) is not None]
            self._pump.close()
            if failures:
                raise failures[0]
            return
        try:
            self._pump.close()
        finally:
            send_bucket(self.peers.send, None)

    def _finish(self, place: str, sent: list[list[tuple[Names, str]]]) -> None:
        self.servers.end_update()

    def _abandon(self) -> None:
        self.close()
        with contextlib.suppress(SyncError):  # an open session would refuse the next one; it may be closed already
            self.servers.end_update()

    def _receive_all(self, rank: int, hand: threading.Lock) -> None:
        """Passes on what a rank sends. One bucket arrives at a time, whose rank has it and waits for nobody else."""

        def receive(tensor: torch.Tensor) -> None:
            self.peers.receive(tensor, rank)

        while (header := receive_header(receive)) is not None:
            with hand:
                self._pump.put(receive_bucket(receive, header, self._buffers))

    def _pass_on(self, way: Callable[[FlatBucket], None], bucket: FlatBucket) -> None:
        way(bucket)
        self._buffers.give(bucket.data)

    def _backend(self) -> Backend:
        """The configured one, or ``choose``'s, with its reason in ``_remark``."""
        if self.config.backend != "auto":
            return self.config.backend
        urls, infos = self.servers.urls, self.servers.infos()
        backend, reason = choose(urls, infos, ours=not self.shared, cards=trainer_cards())
        if reason:
            self._remark = f"weights go to the servers over {backend} (sync.backend): {reason}"
        return backend
