"""Which data-parallel rank and which micro-batch each sequence of a mini-batch goes to.

The work is done in C++ (``csrc/packing.cpp``): a real mini-batch has 1e5 sequences, and every leader makes the plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from megatron_gspo.errors import BatchError, DependencyError

Lengths = TypeVar("Lengths", int, npt.NDArray[np.int64])

ATTENTION_COST = 6.5e-5
"""Cost of attention scores, a token pair, in units of one token's matrix multiplications.

A layer with causal attention spends 2 * A * length**2 FLOPs in forward on scores and values (A = heads * head
dimension) and 2 * W * length on its weights (W = active parameters), so the ratio is A / W. This is Qwen3-30B-A3B's:
A = 32 * 128, W = 63e6 a layer with its share of the output layer. Attention equals the rest at 15,000 tokens."""


@dataclass(frozen=True)
class Plan:
    """A place for each of S sequences, which every data-parallel leader derives from the lengths alone."""

    rank_S: npt.NDArray[np.int32]
    """[S] data-parallel rank, 0 <= rank < num_ranks."""
    microbatch_S: npt.NDArray[np.int32]
    """[S] micro-batch on that rank, 0 <= microbatch < num_microbatches."""
    num_ranks: int
    num_microbatches: int
    """Micro-batches per rank, the same on all of them; some may be empty."""
    rank_costs: npt.NDArray[np.float64]
    """[num_ranks] sum of length + attention_cost * length**2 over a rank's sequences."""

    def microbatches(self, rank: int) -> list[npt.NDArray[np.int64]]:
        """The rank's micro-batches, each the ascending indices of its sequences; an empty one needs a dummy."""
        if not 0 <= rank < self.num_ranks:
            raise BatchError(f"rank {rank} is not in a plan for {self.num_ranks} data-parallel ranks")
        mine = np.flatnonzero(self.rank_S == rank)
        by_microbatch = np.argsort(self.microbatch_S[mine], kind="stable")
        counts = np.bincount(self.microbatch_S[mine], minlength=self.num_microbatches)
        return np.split(mine[by_microbatch], np.cumsum(counts)[:-1]) if self.num_microbatches else []


def padded_length(lengths: Lengths, context: int) -> Lengths:
    """Tokens of a sequence as the model sees it: ``context`` ranks above 1 need two chunks of one length each."""
    multiple = 1 if context == 1 else 2 * context
    return -(-lengths // multiple) * multiple


def plan_microbatches(
    lengths: Sequence[int] | npt.NDArray[Any],
    *,
    token_budget: int,
    num_ranks: int,
    oversize: Literal["error", "own"] = "error",
    multiple_of: int = 1,
    attention_cost: float = ATTENTION_COST,
) -> Plan:
    """Balances sequences over data-parallel ranks and packs each rank's share into micro-batches.

    lengths: [S] tokens of each sequence, at least 1 (under context parallelism, ``padded_length`` of them).
    token_budget: most tokens of a micro-batch. oversize: what happens to a sequence above the budget. multiple_of: the
    number of micro-batches is rounded up to this (an interleaved pipeline schedule wants a multiple of its stages).

    What holds of the plan:

    - Every sequence has exactly one place.
    - A micro-batch keeps to the token budget, or is one oversize sequence alone (``oversize="own"``).
    - Every rank has the same number of micro-batches: with fewer on one, a pipeline schedule or an expert all-to-all
      waits for ever. A rank that needs fewer has empty ones, and the caller fills those with a dummy.
    - The number is near max(ceil(tokens / budget), sequences above half the budget) / num_ranks, the fewest possible.
    - The heaviest rank is within 2% of max(total cost / num_ranks, heaviest sequence), below which no assignment
      gets, once ranks hold some tens of sequences.
    - A rank's micro-batches run from costly to cheap, so those that run at the same time on all ranks cost about as
      much.
    - It depends on the arguments alone; equal lengths are told apart by index.

    Ranks: longest processing time first (Graham 1969), then exchanges between the heaviest rank and a lighter one.
    Micro-batches: best-fit decreasing, then evened out by cost where the budget lets every rank do so.

    Raises BatchError for a length below 1, an oversize sequence (with its index), or an argument out of range;
    DependencyError when the C++ extension is not built.
    """
    lengths_S = _checked_lengths(lengths)
    for name, value in (("token_budget", token_budget), ("num_ranks", num_ranks), ("multiple_of", multiple_of)):
        if not 1 <= value < 2**30:
            raise BatchError(f"{name} = {value}: it must be at least 1 (and below 2**30)")
    if not (math.isfinite(attention_cost) and attention_cost >= 0):
        raise BatchError(f"attention_cost = {attention_cost}: it must be finite and not negative")
    if oversize != "own":
        _refuse_oversize(lengths_S, token_budget)
    rank_S, microbatch_S, num_microbatches, rank_costs = _extension().plan(
        lengths_S, int(token_budget), int(num_ranks), int(multiple_of), float(attention_cost)
    )
    return Plan(rank_S, microbatch_S, int(num_ranks), num_microbatches, rank_costs)


def _checked_lengths(lengths: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    lengths_S = np.asarray(lengths)
    if lengths_S.size == 0:
        lengths_S = lengths_S.astype(np.int64)
    if lengths_S.ndim != 1 or lengths_S.dtype.kind not in "iu":
        raise BatchError(f"lengths has shape {lengths_S.shape} and dtype {lengths_S.dtype}: it must be integers [S]")
    bad = np.flatnonzero(lengths_S < 1)
    if bad.size:
        raise BatchError(f"sequence {bad[0]} has length {lengths_S[bad[0]]}: drop empty sequences before packing")
    return np.ascontiguousarray(lengths_S, dtype=np.int64)


def _refuse_oversize(lengths_S: npt.NDArray[np.int64], token_budget: int) -> None:
    over = np.flatnonzero(lengths_S > token_budget)
    if over.size:
        more = f" (and {over.size - 1} more)" if over.size > 1 else ""
        raise BatchError(
            f"sequence {over[0]} has {lengths_S[over[0]]} tokens, above the micro-batch's {token_budget}{more}: "
            f'raise train.microbatch_tokens, lower rollout.max_response_tokens, or set train.oversize = "own"'
        )


def _extension() -> Any:
    try:
        from megatron_gspo import _packing
    except ImportError as error:
        raise DependencyError(
            f"the C++ extension megatron_gspo._packing cannot be loaded ({error}): build it with `make install`, or "
            f"`pip install --no-build-isolation -e .` in the environment that trains (needs g++ and Python's headers)"
        ) from error
    return _packing
