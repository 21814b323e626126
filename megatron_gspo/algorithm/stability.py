"""How stable an arm is: the learning rate (or another setting) at which half of its runs collapse.

The chance of a collapse is logistic in the log of the setting, p(x) = 1 / (1 + exp(-(a + b log x))), fitted by Firth's
penalised likelihood (Biometrika 80, 1993, 27-38): of a few runs at a few values, which often collapse all beyond one of
them and none below it, the plain likelihood has no maximum. Half of the runs collapse at exp(-a / b).

Runs of one seed share prompts, and seeds of one cold start the weights that training begins with; intervals resample
seeds within cold starts, each with its runs at all values, so they speak of these cold starts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
DRAWS = 2000
STEPS = 100
CONVERGED = 1e-10
Runs = Mapping[int, Mapping[float, bool]]
"""Seed -> value of the setting -> whether its run collapsed."""


@dataclass(frozen=True)
class Half:
    """The value at which half of an arm's runs collapse."""

    value: float
    low: float
    high: float
    """Its 95% interval; 0 and infinity where no end can be told."""
    below: float
    above: float
    """The smallest and the largest value that was run: beyond them ``value`` is the curve's, and not the runs'."""

    @property
    def is_inside(self) -> bool:
        """Whether it lies among the values that were run."""
        return self.below <= self.value <= self.above


def firth(values: np.ndarray, collapsed_DV: np.ndarray, runs_DV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([D] a, [D] b) of logistic curves in the log of positive values, by Newton steps on Firth's modified score
    U(a, b) = sum_i (y_i - p_i + h_i (1/2 - p_i)) (1, log x_i), h the leverages of the weighted design.

    >>> a, b = firth(np.array([1.0, 2.0, 4.0, 8.0]), np.array([[0, 0, 1, 1]]), np.ones((1, 4)))
    >>> round(float(np.exp(-a / b)[0]), 6)
    2.828427

    Args:
        values: [V] of the setting.
        collapsed_DV, runs_DV: [D, V] how many of how many runs at each value collapsed, in D data sets.
    """
    x = np.log(np.asarray(values, dtype=np.float64))
    centre, spread = x.mean(), x.std() or 1.0
    z, k, n = (x - centre) / spread, collapsed_DV.astype(np.float64), runs_DV.astype(np.float64)
    a, b = np.zeros(len(k)), np.zeros(len(k))
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(a[:, None] + b[:, None] * z, -500, 500)))
        weight = np.maximum(p * (1 - p), 1e-12)
        s0, s1, s2 = ((n * weight * z**power).sum(axis=1) for power in range(3))
        determinant = np.maximum(s0 * s2 - s1**2, 1e-300)
        leverage = weight * (s2[:, None] - 2 * s1[:, None] * z + s0[:, None] * z**2) / determinant[:, None]
        residual = k - n * p + n * leverage * (0.5 - p)
        u0, u1 = residual.sum(axis=1), (residual * z).sum(axis=1)
        step_a, step_b = (s2 * u0 - s1 * u1) / determinant, (s0 * u1 - s1 * u0) / determinant
        size = np.maximum(np.maximum(abs(step_a), abs(step_b)), 1e-300)
        a, b = a + step_a * np.minimum(1, 2 / size), b + step_b * np.minimum(1, 2 / size)
        if size.max() < CONVERGED:
            break
    return a - b / spread * centre, b / spread


def halves(runs: Runs, draws: Sequence[Sequence[int]]) -> np.ndarray:
    """[D] exp(-a / b) of the runs of each list of seeds, one that is named twice counting twice; infinity where they
    do not collapse more at larger values."""
    values = sorted({value for of_seed in runs.values() for value in of_seed})
    there = {seed: np.array([value in own for value in values]) for seed, own in runs.items()}
    fell = {seed: np.array([bool(own.get(value)) for value in values]) for seed, own in runs.items()}
    counts, totals = (
        np.array([np.sum([table[seed] for seed in seeds], axis=0) for seeds in draws]) for table in (fell, there)
    )
    a, b = firth(np.array(values), counts, totals)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where((b > 0) & (counts.sum(axis=1) > 0), np.exp(np.clip(-a / b, -700, 700)), np.inf)


def half_with_interval(runs: Runs, cold_starts: Mapping[int, Hashable]) -> Half:
    """An arm's half, with the percentile interval of ``DRAWS`` resamplings of its seeds within cold starts."""
    values = [value for of_seed in runs.values() for value in of_seed]
    low, high = _interval(halves(runs, _resampled(list(runs), cold_starts)))
    return Half(float(halves(runs, [list(runs)])[0]), low, high, min(values), max(values))


def ratio_with_interval(
    one: Runs, other: Runs, cold_starts: Mapping[int, Hashable]
) -> tuple[float, float, float] | None:
    """(half of one / half of the other, its 95% interval) over the seeds that both have, resampled together; None
    where an arm has no half, or has none in half of the resamplings."""
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return None
    draws = [seeds, *_resampled(seeds, cold_starts)]
    with np.errstate(invalid="ignore"):
        ratios = halves(one, draws) / halves(other, draws)
    known = ratios[1:][np.isfinite(ratios[1:]) & (ratios[1:] > 0)]
    if not (np.isfinite(ratios[0]) and ratios[0] > 0) or len(known) < DRAWS / 2:
        return None
    return (float(ratios[0]), *_interval(known))


def _resampled(seeds: Sequence[int], cold_starts: Mapping[int, Hashable]) -> list[list[int]]:
    """``DRAWS`` times, of each cold start as many of its seeds as there are, drawn with replacement."""
    rng = np.random.default_rng(0)
    groups: dict[Hashable, list[int]] = {}
    for seed in seeds:
        groups.setdefault(cold_starts[seed], []).append(seed)
    return [
        [group[i] for group in groups.values() for i in rng.integers(0, len(group), len(group))] for _ in range(DRAWS)
    ]


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    ordered = np.sort(drawn)
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    low, high = (float(ordered[min(int(end * len(ordered)), len(ordered) - 1)]) for end in ends)
    return low, high
