"""The rollout servers as every rank sees them: who holds the run's weights, who is lost, and who may come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist

from megatron_gspo.errors import NoServerError
from megatron_gspo.parallel.exchange import broadcast_object, gather_objects, together
from megatron_gspo.rollout.engine import Engine

COUNTED = ("lost", "returned", "restarted", "moved", "resubmitted")
"""What is counted from one outer step's report to the next, as ``servers/*``."""


@dataclass(frozen=True)
class Sight:
    """What the first rank has seen of the servers."""

    holding: tuple[str, ...] = ()
    """They answer, and hold the version that was asked about."""
    empty: tuple[str, ...] = ()
    """They answer, and hold another one, or none."""
    gone: Mapping[str, str] = field(default_factory=dict)
    """URL -> why it cannot be asked for responses."""
    notes: tuple[str, ...] = ()
    restarted: int = 0
    """Servers of this run's own that were started again just now."""
    router: str = ""
    """Why the router cannot be asked; empty where it can, or there is none."""


class Watch(Protocol):
    """Looks at servers; on the first rank alone (``train.watch.Watchman``)."""

    def look(self, version: str, suspects: Collection[str]) -> Sight:
        """All servers, now. ``suspects`` were given up: they must show that they generate."""
        ...

    def gone(self, urls: Sequence[str]) -> dict[str, str]:
        """Those of ``urls`` that do not answer, or were started again since this run has sent them anything."""
        ...


class Fleet:
    """Which servers are asked for responses and sent weights; the same on every rank.

    A server leaves when a draw or a push finds it gone, and returns when it answers, generates, and holds the current
    weights. Every method but ``metrics`` is collective.
    """

    def __init__(
        self,
        urls: Sequence[str],
        world: dist.ProcessGroup,
        watch: Watch | None,
        *,
        survives: bool = True,
    ) -> None:
        """
        Args:
            urls: all servers.
            world: all ranks.
            watch: on the first rank.
            survives: whether a run goes on after the loss of a server.
        """
        self.urls = self.up = tuple(url.rstrip("/") for url in urls)
        self.down: dict[str, str] = {}
        self.notes: list[str] = []
        self.survives = survives
        self._suspects: set[str] = set()
        self._world, self._watch = world, watch
        self._counts: Counter[str] = Counter()

    def survey(self, version: str) -> tuple[str, ...]:
        """Looks at all servers, and starts those of this run again that have died. Returns what must be given
        ``version`` before it is asked for anything. Raises NoServerError where a router is gone."""
        sight = self._seen(lambda watch: watch.look(version, self._suspects))
        self.notes += sight.notes
        self._counts["restarted"] += sight.restarted
        self.leave_out(sight.gone)
        self.leave_out({url: f"{url} was started again since the last sync" for url in sight.empty})
        if sight.router:
            raise NoServerError(sight.router)
        self._admit([url for url in sight.holding if url in self.down])
        return sight.empty

    def fill(self, urls: Collection[str]) -> None:
        """These hold the current weights now. Not collective: it is said on every rank."""
        self._admit([url for url in urls if url not in self.up])

    def leave_out(self, gone: Mapping[str, str], *, suspected: bool = False) -> None:
        """These get nothing more until they return; the same on every rank. ``suspected``: they may still answer."""
        for url, why in gone.items():
            if url in self.up:
                self.up = tuple(other for other in self.up if other != url)
                self._counts["lost"] += 1
                self.notes.append(f"warning: a rollout server is lost, and {len(self.up)} are left: {why}")
            self.down[url] = why
            if suspected:
                self._suspects.add(url)

    def hear(self, engine: Engine) -> None:
        """What the leaders' draws have found out."""
        for lost, moved, resubmitted in gather_objects(
            (dict(engine.lost), engine.moved, engine.resubmitted), self._world
        ):
            self.leave_out({url: why for url, why in lost.items() if url in self.urls}, suspected=True)
            self._counts["moved"] += moved
            self._counts["resubmitted"] += resubmitted

    def outlives(self, urls: Sequence[str]) -> frozenset[str]:
        """After a push to ``urls`` that failed: those that are gone, which are left out until they generate again; none
        where it failed for another reason, or where a run does not outlive it."""
        if not self.survives:
            return frozenset()
        gone = self._seen(lambda watch: Sight(gone=watch.gone(urls))).gone
        self.leave_out(gone, suspected=True)  # one that hangs is alive, and has to be started again
        return frozenset(gone)

    def metrics(self) -> dict[str, float]:
        """``servers/*`` since the last call."""
        counts, self._counts = self._counts, Counter()
        return {"servers/up": float(len(self.up)), **{f"servers/{name}": float(counts[name]) for name in COUNTED}}

    @property
    def why_none(self) -> str:
        """What has become of the servers, in one line."""
        return "; ".join(self.down[url] for url in self.urls if url in self.down) or "none answers"

    def _seen(self, look: Callable[[Watch], Sight]) -> Sight:
        watch = self._watch
        return broadcast_object(together(lambda: look(watch) if watch else None, self._world), 0, self._world)

    def _admit(self, urls: Collection[str]) -> None:
        self.up = tuple(url for url in self.urls if url in self.up or url in urls)
        for url in urls:
            if self.down.pop(url, None) is not None:
                self._counts["returned"] += 1
                self.notes.append(f"{url} is back, with the current weights")
            self._suspects.discard(url)
