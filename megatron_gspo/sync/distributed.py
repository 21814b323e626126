"""Weight sync over a process group that rank 0 shares with the servers."""

from __future__ import annotations

from typing import Any

from megatron_gspo.sync import group
from megatron_gspo.sync.backend import Backend, choose, trainer_cards
from megatron_gspo.sync.flat import Buffers, FlatBucket
from megatron_gspo.sync.hub import HubSync


class DistributedSync(HubSync):
    """Rank 0 broadcasts the buckets. Over nccl they stay in GPU memory from the owner to the server; over gloo they go
    through the hosts' memory."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._group: group.ServerGroup | None = None

    def close(self) -> None:
        """Leaves the groups."""
        super().close()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _begin(self) -> str:
        if self._group is None:
            self._group = group.ServerGroup(self.servers, backend=self._backend(), timeout_s=self.config.timeout_s)
        self.servers.begin_update()
        return self._group.backend

    def _buffers_of(self, place: str) -> Buffers:
        return Buffers(group.device_of("nccl" if place == "nccl" else "gloo"))

    def _deliver(self, bucket: FlatBucket) -> None:
        assert self._group is not None, "the group is joined in _begin"
        self._group.broadcast(bucket)

    def _path(self) -> str:
        backend = self._group.backend if self._group is not None else self.config.backend
        return {"gloo": "gloo, through host memory", "nccl": "nccl, from GPU memory"}.get(backend, "a process group")

    def _backend(self) -> Backend:
        """The configured one, or ``choose``'s, with its reason in ``_remark``."""
        if self.config.backend != "auto":
            return self.config.backend
        urls, infos = self.servers.urls, self.servers.infos()
        backend, reason = choose(urls, infos, ours=not self.shared, cards=trainer_cards())
        if reason:
            self._remark = f"weights go to the servers over {backend} (sync.backend): {reason}"
        return backend
