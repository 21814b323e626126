"""What a dry run found, without torch: for ``plan`` and for the process that ran it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

HOST = "host"
"""The part that lies in host memory and not on the card."""


class Moment(NamedTuple):
    """When a rank was at its fullest."""

    phase: str
    """ "pi_old", "train" (forward and backward), "optimizer" or "sync"."""
    site: str
    """ "layers", "head", "embedding", "dispatch" (tokens on their way to experts); "step", "gather"."""


@dataclass(frozen=True)
class Peak:
    """The fullest moment of one kind of rank: bytes by part."""

    parts: dict[str, float]
    """weights, gradients, optimizer, reference, critic; activations (what backward needs), head (tiles, sums),
    dispatch (rows on their way to experts and back), passing (what comes and goes)."""
    moment: Moment
    host: float = 0
    """Bytes in host memory, with ``optimizer.offload``."""

    @property
    def total(self) -> float:
        """Bytes on the card."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Collectives:
    """Collectives of one kind over one group, of one rank in an outer step's first optimizer step."""

    kind: str
    group: str
    count: float
    bytes: float
    """Of the whole tensor: what goes into a reduction, what comes out of a gather."""


@dataclass(frozen=True)
class Rank:
    """What one kind of rank does."""

    peaks: dict[Moment, Peak]
    """The fullest state of each phase and site."""
    collectives: tuple[Collectives, ...]
    flops: float
    """Of pi_old, forward, recompute and backward: products of matrices and attention, without masked scores."""
    host: float = 0

    @property
    def peak(self) -> Peak:
        """The fullest of all."""
        return max(self.peaks.values(), key=lambda peak: peak.total)

    @property
    def phases(self) -> dict[str, Peak]:
        """The fullest moment of each phase."""
        best: dict[str, Peak] = {}
        for moment, peak in self.peaks.items():
            if moment.phase not in best or peak.total > best[moment.phase].total:
                best[moment.phase] = peak
        return best


@dataclass(frozen=True)
class DryRun:
    """The kinds of ranks of a layout, and how ``doctor``'s sum compares."""

    ranks: dict[str, Rank]
    """ "stage 0 of 8" -> what its ranks do."""
    estimate: dict[str, float]
    """The same names -> bytes at the fullest moment by ``doctor``'s formulas."""
    seconds: float
    """That the dry run took."""
    full_depth: bool
    """Whether every layer was run, and not two depths of which the rest follows."""
    left_out: tuple[str, ...] = field(
        default=(
            "the CUDA context",
            "NCCL's buffers",
            "fragmentation of the allocator",
            "workspaces of cuBLAS",
            "uneven loads of experts",
            "servers",
        )
    )

    @property
    def peaks(self) -> dict[str, Peak]:
        """The fullest moment of each kind of rank."""
        return {name: rank.peak for name, rank in self.ranks.items()}

    @property
    def collectives(self) -> dict[str, tuple[Collectives, ...]]:
        """Of each kind of rank."""
        return {name: rank.collectives for name, rank in self.ranks.items()}

    @property
    def flops(self) -> dict[str, float]:
        """Of each kind of rank, in an optimizer step with its pi_old pass."""
        return {name: rank.flops for name, rank in self.ranks.items()}

    @property
    def fullest(self) -> str:
        """The kind of rank that holds most."""
        return max(self.ranks, key=lambda name: self.ranks[name].peak.total)

    @property
    def agreement(self) -> float:
        """``doctor``'s peak of the fullest kind of rank over what was counted."""
        return self.estimate[self.fullest] / self.ranks[self.fullest].peak.total
