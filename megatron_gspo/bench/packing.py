"""How fast and how even the micro-batch planner is, on lengths as RL batches have them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from megatron_gspo.batching.planning import ATTENTION_COST, Plan, plan_microbatches
from megatron_gspo.bench.measure import Spread, machine

Lengths = npt.NDArray[np.int64]

TIME_AIM_MS, BALANCE_AIM = 200.0, 1.02
"""100,000 sequences on one core; the heaviest rank over the lower bound."""


def lognormal(rng: np.random.Generator, count: int) -> Lengths:
    """One task: median 665 tokens, a tail that the response limit cuts."""
    return np.clip(rng.lognormal(6.5, 0.9, count), 16, 16384).astype(np.int64)


def bimodal(rng: np.random.Generator, count: int) -> Lengths:
    """Short answers (80%), and long chains of thought."""
    return np.where(rng.random(count) < 0.8, rng.integers(100, 400, count), rng.integers(6000, 8000, count))


def long_tail(rng: np.random.Generator, count: int) -> Lengths:
    """Pareto, exponent 1.2: most of the tokens lie in few sequences."""
    return np.clip(64 * (1 + rng.pareto(1.2, count)), 64, 32768).astype(np.int64)


def at_the_limit(rng: np.random.Generator, count: int) -> Lengths:
    """A reasoning run: a prompt of 50 to 500 tokens, and a third of the responses cut at 16,384."""
    response = np.where(rng.random(count) < 1 / 3, 16384, np.clip(rng.lognormal(8.3, 0.7, count), 32, 16384))
    return rng.integers(50, 500, count) + response.astype(np.int64)


MIXES: dict[str, Callable[[np.random.Generator, int], Lengths]] = {
    "lognormal": lognormal,
    "bimodal": bimodal,
    "long tail": long_tail,
    "at the limit": at_the_limit,
}


def lower_bounds(lengths: Lengths, token_budget: int, num_ranks: int) -> tuple[float, int]:
    """(heaviest rank's cost, micro-batches per rank): no plan is below either.

    Cost: the mean of ranks, or the heaviest sequence. Micro-batches: what the tokens fill, or one for each sequence
    above half the budget.
    """
    cost_S = lengths + ATTENTION_COST * lengths.astype(np.float64) ** 2
    bins = max(-(-int(lengths.sum()) // token_budget), int((2 * lengths > token_budget).sum()))
    return max(cost_S.sum() / num_ranks, cost_S.max()), -(-bins // num_ranks)


def run(
    *,
    sequences: int = 100_000,
    ranks: tuple[int, ...] = (1, 8, 64, 512),
    token_budget: int = 32768,
    repetitions: int = 5,
) -> dict[str, Any]:
    """Plans each mix for each number of data-parallel ranks.

    Returns {"machine", "settings", "rows": [{"mix", "ranks", "ms": {median, smallest, largest}, "heaviest_rank",
    "microbatches"}]}: processor milliseconds, and two ratios to ``lower_bounds``.
    """
    rows = []
    for name, draw in MIXES.items():
        lengths = np.minimum(draw(np.random.default_rng(0), sequences), token_budget)
        for num_ranks in ranks:
            milliseconds = []
            for _ in range(repetitions):
                started = time.process_time()
                plan = plan_microbatches(lengths, token_budget=token_budget, num_ranks=num_ranks)
                milliseconds.append(1e3 * (time.process_time() - started))
            rows.append(_row(name, lengths, token_budget, plan, Spread.of(milliseconds)))
    settings = {"sequences": sequences, "token_budget": token_budget, "repetitions": repetitions}
    return {"machine": machine(torch.device("cpu")), "settings": settings, "rows": rows}


def _row(name: str, lengths: Lengths, token_budget: int, plan: Plan, ms: Spread) -> dict[str, Any]:
    cost, microbatches = lower_bounds(lengths, token_budget, plan.num_ranks)
    return {
        "mix": name,
        "ranks": plan.num_ranks,
        "ms": {"median": ms.median, "smallest": ms.smallest, "largest": ms.largest},
        "heaviest_rank": float(plan.rank_costs.max() / cost),
        "microbatches": plan.num_microbatches / microbatches,
    }
