"""What methods have in common whose buckets all go through rank 0, which delivers them to the servers."""

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
from megatron_gspo.sync.background import Pump
from megatron_gspo.sync.base import CARD_BUCKET_MB, HOST_BUCKET_MB, BucketSync, NamedTensor, Names
from megatron_gspo.sync.flat import Buffers, FlatBucket, flatten, receive_bucket, receive_header, send_bucket


class HubSync(BucketSync):
    """Every owner hands its buckets to rank 0, which delivers them to the servers, in an update session.

    Three things go on at once: this rank's next bucket is gathered, its last one is on its way to rank 0, and rank 0
    delivers the one before. Rank 0 takes the next bucket from whichever owner has one. A fixed order would deadlock:
    the owner whose turn it is may be in a gather with another that waits to be asked.
    """

    _pump: Pump[FlatBucket]
    _receivers: list[Future[None]]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._buffers = Buffers()

    def close(self) -> None:
        """Gives the buffers' memory back."""
        self._buffers = Buffers()

    def _rest(self) -> None:
        self._buffers.rest()

    def _deliver(self, bucket: FlatBucket) -> None:
        """On rank 0: a bucket into every server; its memory is used again when this returns, and not if it raises."""
        raise NotImplementedError

    def _buffers_of(self, place: str) -> Buffers:
        """The memory that this rank's buckets are made in."""
        raise NotImplementedError

    def _open(self, place: str) -> None:
        wanted = self._buffers_of(place)
        if (type(wanted), wanted.device) != (type(self._buffers), self._buffers.device):
            self._buffers = wanted
        if not self.peers.lead:
            self._pump = Pump(functools.partial(self._pass_on, functools.partial(send_bucket, self.peers.send)))
            return
        self._pump = Pump(functools.partial(self._pass_on, self._deliver))
        hand = threading.Lock()
        self._receivers = [
            start(functools.partial(self._receive_all, rank, hand)) for rank in range(1, self.peers.world_size)
        ]

    def _bucket_mb(self) -> int:
        ours = CARD_BUCKET_MB if self._buffers.device.type == "cuda" else HOST_BUCKET_MB
        return self.config.bucket_mb or ours

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
        """Passes on what a rank sends. One bucket arrives at a time, whose rank has it and waits for nobody else.

        Whatever has become of the servers, and of memory here, this takes all that a rank has: it would wait for ever
        with a transfer that nobody takes.
        """
        failure: Exception | None = None

        def receive(tensor: torch.Tensor) -> None:
            self.peers.receive(tensor, rank)

        while (header := receive_header(receive)) is not None:
            with hand:
                try:
                    self._pump.put(receive_bucket(receive, header, self._buffers))
                except Exception as error:
                    failure = error
        if failure is not None:
            raise failure

    def _pass_on(self, way: Callable[[FlatBucket], None], bucket: FlatBucket) -> None:
        way(bucket)
        self._buffers.give(bucket.data)
