"""Which routes the passes of an outer step replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

from megatron_gspo.errors import ReplayError
from megatron_gspo.types import RouteShard

Mode = Literal["off", "r2", "r3"]
"""``replay.mode``."""
Dealt = Sequence[Sequence[RouteShard]]
"""The engine's routes of an outer step, by mini-batch and micro-batch: this rank's layers and tokens."""


@dataclass(frozen=True)
class MinibatchRoutes:
    """The routes of one mini-batch, a ``RouteShard`` a micro-batch: this rank's layers and tokens."""

    old: list[RouteShard]
    """What routers would choose by themselves in the pi_old pass; what they did choose in it, without R3."""
    replayed: Sequence[RouteShard] | None
    """What routers are made to choose in training; None: they choose for themselves."""


def routes_of_old_pass(mode: Mode, engine: Dealt | None) -> list[RouteShard] | None:
    """What the pi_old pass replays: under R3 the engine's routes, otherwise nothing.

    Raises ReplayError when R3 has no routes of the engine.
    """
    if mode != "r3":
        return None
    if engine is None:
        raise ReplayError('replay.mode = "r3", and the responses of this outer step came without routes')
    return list(chain.from_iterable(engine))


def routes_of_training(
    mode: Mode, sizes: Sequence[int], old: Sequence[RouteShard], engine: Dealt | None
) -> list[MinibatchRoutes]:
    """By mini-batch, what training replays: under R2 the choices of the pi_old pass, under R3 the engine's.

    Args:
        sizes: micro-batches of each mini-batch.
        old: live choices of the pi_old pass, over all of them.
    """
    rest = iter(old)
    olds = [list(islice(rest, size)) for size in sizes]
    replayed: Sequence[Sequence[RouteShard] | None] = [None] * len(olds)
    if mode != "off":
        replayed = olds if mode == "r2" else engine or []
    return [MinibatchRoutes(own, routes) for own, routes in zip(olds, replayed, strict=True)]
