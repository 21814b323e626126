"""What strikes a run, and when: a list drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

KINDS = {
    "kill a rank": 4,
    "kill a rank's watcher": 3,
    "kill the launcher": 3,
    "kill a server": 3,
    "stop a rank": 1,
    "pause a rank": 2,
    "pause a server": 1,
    "fill the disk": 2,
    "cut connections": 3,
}
"""Kind -> how often it is drawn. A rank is two processes: the one that works, and the one that waits for it."""
MOMENTS = {
    "start": (2, 8.0),
    "rollout": (3, 0.3),
    "training": (3, 1.5),
    "sync": (4, 0.4),
    "checkpoint": (4, 0.15),
    "publication": (2, 0.02),
}
"""Moment -> (how often it is drawn, seconds after which the fault strikes at the latest)."""
RANKS = 2
SERVERS = 2


@dataclass(frozen=True)
class Fault:
    """One fault."""

    number: int
    kind: str
    moment: str
    """What must have begun, after the fault before it has struck."""
    after_s: float
    """Since then."""
    target: int
    """Which rank, or which server."""

    def __str__(self) -> str:
        which = {"rank": f" ({self.target})", "server": f" ({self.target})"}
        text = next((more for word, more in which.items() if word in self.kind), "")
        return f"#{self.number} {self.kind}{text} {self.after_s:.2f} s into {self.moment}"


def draw(seed: int, count: int, *, without: frozenset[str] = frozenset()) -> list[Fault]:
    """The first ``count`` faults of a seed, ``without`` the kinds that this machine cannot make."""
    chance = random.Random(seed)
    kinds = {kind: weight for kind, weight in KINDS.items() if kind not in without}
    found = []
    for number in range(1, count + 1):
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        moment = chance.choices(list(MOMENTS), [weight for weight, _ in MOMENTS.values()])[0]
        after_s = chance.uniform(0.0, MOMENTS[moment][1])
        found.append(Fault(number, kind, moment, after_s, chance.randrange(max(RANKS, SERVERS))))
    return found
