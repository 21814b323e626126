"""The other trainer ranks, as weight sync sees them: one collective and a way to rank 0, handed in by training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_gspo.errors import SyncError

T = TypeVar("T")


def _alone(value: Any) -> list[Any]:
    return [value]


def _nobody(*_: Any) -> None:
    raise SyncError("a single trainer rank has nobody to exchange tensors with")


@dataclass(frozen=True)
class Peers:
    """This rank among all trainer ranks. The default is a single process."""

    rank: int = 0
    world_size: int = 1
    all_gather: Callable[[Any], list[Any]] = _alone
    """Every rank's picklable value, in rank order, on every rank (as ``torch.distributed.all_gather_object``). It is
    the barrier of weight sync; one thread a rank calls it at a time."""
    send: Callable[[torch.Tensor], object] = _nobody
    """A tensor to rank 0; blocks until it may be reused. Those on the CPU arrive in order, and so do a GPU's, which go
    from card to card."""
    receive: Callable[[torch.Tensor, int], object] = _nobody
    """Fills a tensor with what the given rank sends from the same kind of memory. On rank 0; may be called from a
    thread for each rank."""
    broadcast: Callable[[torch.Tensor], object] = _nobody
    """Rank 0's tensor into every rank's, of the same size and kind of memory; from one thread a rank."""

    @property
    def lead(self) -> bool:
        """Whether this rank talks to servers."""
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> list[T]:
        """Runs ``action`` on every rank, returns all results, or raises SyncError on *every* rank if one raised.

        Without this a failure on one rank would leave the others waiting in the next collective.
        """
        outcome: tuple[Any, str | None]
        cause = None
        try:
            outcome = action(), None
        except Exception as error:
            cause = error
            outcome = None, str(error) if isinstance(error, SyncError) else f"{type(error).__name__}: {error}"
        outcomes = self.all_gather(outcome)
        failures = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message is not None]
        if failures:
            raise SyncError("weight sync failed on " + "; ".join(failures)) from cause
        return [result for result, _ in outcomes]
