"""Weight sync by handles: servers open the trainer's memory, shared files on a CPU and CUDA IPC on a GPU."""

from __future__ import annotations

import json
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from megatron_gspo.calls import start
from megatron_gspo.errors import SyncError
from megatron_gspo.sync.backend import this_card
from megatron_gspo.sync.flat import HOST, Buffers, FlatBucket
from megatron_gspo.sync.handles import CardBuffers, SharedBuffers, payload
from megatron_gspo.sync.hub import HubSync
from megatron_gspo.sync.places import ServerPlace, ServerRank, assign, check_reach, check_readers, places, within_reach

Payloads = dict[ServerRank, bytes]


class IpcSync(HubSync):
    """A bucket is put into memory that every rank of every server can open; a request says where it lies.

    On a CPU that is memory of rank 0's machine, and rank 0 alone makes handles. On GPUs a server's tensor rank opens
    memory of its own card alone (to open another's it would take a context there, some hundred megabytes): rank 0's
    bucket goes to the trainer rank on each of those cards first, by one broadcast among trainer ranks.

    Memory is used again when every server has said that it has loaded the bucket. After a failure rank 0 lets it go: a
    server may still read it, and it is freed when all have closed it.
    """

    _servers: tuple[ServerPlace, ...] = ()
    _mine: tuple[ServerRank, ...] = ()
    """Server ranks that open this rank's memory."""
    _spreading = False
    """Whether other ranks than rank 0 make handles; all of them then follow what it delivers."""
    _follower: Future[None] | None = None
    _held: FlatBucket | None = None
    """Rank 0's bucket in this rank's memory."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._exports: SharedBuffers | CardBuffers = SharedBuffers()

    def close(self) -> None:
        """See ``HubSync.close``."""
        super().close()
        self._held = None
        self._exports = SharedBuffers()

    def _begin(self) -> str:
        found = places(self.servers.urls, self.servers.infos())
        check_readers(found)
        self.servers.begin_update()
        return json.dumps([asdict(server) for server in found])

    def _agree(self, place: str) -> None:
        entries: list[dict[str, Any]] = json.loads(place)
        self._servers = tuple(ServerPlace(**{**entry, "cards": tuple(entry["cards"])}) for entry in entries)
        assigned = assign(self.peers.together(self._reach))
        check_reach(self._servers, assigned)  # on every rank alike
        self._spreading = any(assigned.values())
        self._mine = tuple(rank for rank, trainer in assigned.items() if trainer == self.peers.rank)

    def _reach(self) -> list[ServerRank]:
        device = this_card() if self._servers[0].device == "cuda" else HOST
        if self._exports.device != device:
            self._exports = CardBuffers(device) if device.type == "cuda" else SharedBuffers()
        return within_reach(self._servers, device.index)

    def _buffers_of(self, place: str) -> Buffers:
        return self._exports if self.peers.lead else Buffers(self._exports.device)

    def _open(self, place: str) -> None:
        super()._open(place)
        follows = self._spreading and not self.peers.lead
        self._follower = start(self._follow) if follows else None

    def _flush(self) -> None:
        try:
            super()._flush()
        finally:
            if self._spreading and self.peers.lead:
                self._spread(None)
            if self._follower is not None:
                self._follower.result()

    def _rest(self) -> None:
        super()._rest()
        self._exports.rest()

    def _deliver(self, bucket: FlatBucket) -> None:
        made = self._spread(bucket) if self._spreading else self._handles(bucket)
        self.servers.post_handles(
            [[made[index, rank] for rank in range(len(server.cards))] for index, server in enumerate(self._servers)]
        )

    def _handles(self, bucket: FlatBucket) -> Payloads:
        return {rank: payload(bucket, self._exports.handle(bucket.data)) for rank in self._mine}

    def _spread(self, bucket: FlatBucket | None) -> Payloads:
        """Rank 0's bucket in the memory of every rank, and all handles of it; none when rank 0 says, by None, that no
        more will come. Collective. Raises SyncError on every rank if one has no room or cannot make its handles.

        That rank 0 sends the next one, or ends, says that the servers are done with the one before.
        """
        header = self.peers.all_gather(bucket and (bucket.layout, len(bucket.data)))[0]
        if self._held is not None and not self.peers.lead:
            self._exports.give(self._held.data)
        self._held = None
        if header is None:
            return {}
        held: list[FlatBucket] = []
        self.peers.together(lambda: held.append(bucket or self._room(*header)))  # or nobody enters the broadcast
        [self._held] = held
        self.peers.broadcast(held[0].data)
        parts = self.peers.together(lambda: self._handles(held[0]))
        return {rank: handle for part in parts for rank, handle in part.items()}

    def _room(self, layout: dict[str, Any], size: int) -> FlatBucket:
        return FlatBucket(data=self._exports.take(size), **layout)

    def _follow(self) -> None:
        """Takes part in rank 0's ``_spread`` until the last; its failures are rank 0's too, which raises them."""
        while True:
            try:
                if not self._spread(None):
                    return
            except SyncError:
                continue

    def _path(self) -> str:
        return "CUDA IPC" if self._exports.device.type == "cuda" else "shared memory"
