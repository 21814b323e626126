"""``sync.method = "auto"``: the fastest method that servers can take, decided once and said."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gspo.config import SyncConfig
from megatron_gspo.sync.backend import choose, this_card, trainer_cards
from megatron_gspo.sync.base import HOST_BUCKET_MB, BucketSync, NamedTensor
from megatron_gspo.sync.handles import SHARED, shared_room
from megatron_gspo.sync.places import ServerPlace, ServerRank, assign, out_of_reach, places, within_reach

ROOM = 8 * HOST_BUCKET_MB * 1_000_000
"""Bytes of shared memory from which buckets go through it; at most five are under way."""


@dataclass(frozen=True)
class Choice:
    """A method by name, and why."""

    method: str
    why: str
    backend: str = "auto"

    def __str__(self) -> str:
        return f"{self.method}{f' over {self.backend}' if self.backend != 'auto' else ''}: {self.why}"


def decide(
    urls: Sequence[str],
    infos: Sequence[Mapping[str, Any]],
    assigned: Mapping[ServerRank, int],
    *,
    ours: bool,
    cards: Collection[int],
    room: int,
) -> Choice:
    """The table of docs/sync.md.

    Args:
        urls: Of the servers.
        infos: Their settings, in the same order.
        assigned: Server ranks that can open the memory of a trainer rank (``places.assign``).
        ours: Whether this run has started the servers: they are this user's, and number GPUs as it does.
        cards: GPUs of a machine's trainer ranks; empty on a CPU.
        room: Bytes free in shared memory, which only CPUs need.
    """
    servers = places(urls, infos)
    reached = ours and _can_open(servers, assigned, on_cards=bool(cards))
    if reached and (cards or room >= ROOM):
        shared = "the trainer's GPUs" if cards else "this machine's memory"
        return Choice("ipc", f"the servers are this run's and share {shared}")
    backend, reason = choose(urls, infos, ours=ours, cards=cards)
    return Choice("distributed", reason or _why_not(ours, reached), backend)


def _why_not(ours: bool, reached: bool) -> str:
    if reached:
        return f"{SHARED} has less than {ROOM / 1e6:.0f} MB free"
    return "not all servers are on this machine" if ours else "not all servers are this run's own"


def _can_open(servers: Sequence[ServerPlace], assigned: Mapping[ServerRank, int], *, on_cards: bool) -> bool:
    wanted = "cuda" if on_cards else "cpu"
    sound = all(server.device == wanted and server.stages == 1 for server in servers)
    return sound and not out_of_reach(servers, assigned)


class ChosenSync:
    """The ``WeightSync`` of "auto": asks the servers at its first use, and is the method that it then chose."""

    def __init__(self, asking: BucketSync, make: Callable[[SyncConfig], BucketSync]) -> None:
        self._asking = asking
        self._make = make
        self._chosen: BucketSync | None = None
        self._why = self._remark = ""

    @property
    def wants_all(self) -> bool:
        """See ``WeightSync.wants_all``."""
        return self._chosen is None or self._chosen.wants_all

    def push(self, tensors: Iterator[NamedTensor], version: int, names: Collection[str] | None = None) -> str:
        """See ``WeightSync.push``."""
        said = self._sync().push(tensors, version, names)
        remark, self._remark = self._remark, ""
        return "; ".join(filter(None, (said, remark if self._asking.peers.lead else "")))

    def fill(self, tensors: Iterator[NamedTensor], version: int, urls: Sequence[str] | None = None) -> str:
        """See ``WeightSync.fill``. Of other servers than before, what is best is asked again."""
        if urls is not None and tuple(urls) != self._asking.servers.urls:
            self.close()
            self._asking.serve(urls)
            self._chosen = None
        return self._sync().fill(tensors, version)

    def reach(self, urls: Sequence[str]) -> None:
        """See ``WeightSync.reach``. The method stays: it reaches them all the same."""
        self._asking.reach(urls)
        if self._chosen is not None:
            self._chosen.reach(urls)

    def describe(self) -> dict[str, str]:
        """See ``WeightSync.describe``."""
        return {**self._sync().describe(), "why": self._why}

    def close(self) -> None:
        """See ``WeightSync.close``."""
        if self._chosen is not None:
            self._chosen.close()

    def _sync(self) -> BucketSync:
        if self._chosen is None:
            choice = self._decide()
            config = self._asking.config
            backend = choice.backend if config.backend == "auto" else config.backend
            self._chosen = self._make(config.model_copy(update={"method": choice.method, "backend": backend}))
            self._chosen.serve(self._asking.servers.urls)
            self._why = choice.why
            self._remark = f"weights go to the servers by {choice} (sync.method)"
        return self._chosen

    def _decide(self) -> Choice:
        peers, servers = self._asking.peers, self._asking.servers
        found = peers.together(lambda: places(servers.urls, servers.infos()) if peers.lead else [])[0]
        cards = trainer_cards()
        card = this_card().index if cards else None
        assigned = assign(peers.together(lambda: within_reach(found, card)))

        def by_rank_0() -> Choice | None:
            if not peers.lead:
                return None
            return decide(
                servers.urls, servers.infos(), assigned, ours=not self._asking.shared, cards=cards, room=shared_room()
            )

        choice = peers.together(by_rank_0)[0]
        assert choice is not None, "of rank 0"
        return choice
