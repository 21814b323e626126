"""How stable an arm is: the learning rate (or another setting) at which half of its runs collapse.

The chance of a collapse is logistic in the log of the setting, p(x) = 1 / (1 + exp(-(a + b log x))), fitted by Firth's
penalised likelihood (Biometrika 80, 1993, 27-38): of a few runs at a few values, which often collapse all beyond one of
them and none below it, the plain likelihood has no maximum. Half of the runs collapse at exp(-a / b).

An interval is, end by end, the wider of two. The curve's own, from its information, knows how few the runs are, and
takes each for independent. Resampling seeds within cold starts, each with its runs at all values, knows that runs of
one seed share prompts; but of a few seeds that did alike it makes no interval at all. n - 1 of a cold start's n seeds
are drawn, and each counts n / (n - 1) times, so that few seeds do not make it narrow (Rao and Wu, Journal of the
American Statistical Association 83, 1988, 231-241). Both speak of these cold starts.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
ERRORS = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
"""How many standard errors an end of the curve's own interval is away."""
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


def halves(runs: Runs, weights_DS: np.ndarray) -> np.ndarray:
    """[D] exp(-a / b), where each data set counts every seed's runs as often as ``weights_DS`` [D, seeds] says;
    infinity where they do not collapse more at larger values."""
    a, b = _curves(runs, weights_DS)[:2]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(b > 0, np.exp(np.clip(-a / b, -700, 700)), np.inf)


def log_half_error(runs: Runs) -> float:
    """The standard error of log(half): that of -a / b by the curve's information, to first order; infinity where there
    is no half."""
    a_D, b_D, x, n_DV = _curves(runs, np.ones((1, len(runs))))
    (a,), (b,), n = a_D, b_D, n_DV[0]
    if not b > 0:
        return math.inf
    p = 1 / (1 + np.exp(-np.clip(a + b * x, -500, 500)))
    weight = n * np.maximum(p * (1 - p), 1e-12)
    information = np.array([[weight.sum(), (weight * x).sum()], [(weight * x).sum(), (weight * x * x).sum()]])
    slope = np.array([-1 / b, a / b**2])
    return math.sqrt(max(float(slope @ np.linalg.solve(information, slope)), 0.0))


def half_with_interval(runs: Runs, cold_starts: Mapping[int, Hashable]) -> Half:
    """An arm's half, with its interval."""
    values = [value for of_seed in runs.values() for value in of_seed]
    (value,) = halves(runs, np.ones((1, len(runs))))
    low, high = _interval(halves(runs, _resampled(list(runs), cold_starts)))
    own = math.exp(min(ERRORS * log_half_error(runs), 700.0))
    return Half(float(value), min(low, float(value) / own), max(high, float(value) * own), min(values), max(values))


def ratio_with_interval(
    one: Runs, other: Runs, cold_starts: Mapping[int, Hashable]
) -> tuple[float, float, float] | None:
    """(half of one / half of the other, its 95% interval) over the seeds that both have, resampled together; None
    where an arm has no half, or has none in half of the resamplings."""
    seeds = [seed for seed in one if seed in other]
    if not seeds:
        return None
    one, other = ({seed: runs[seed] for seed in seeds} for runs in (one, other))
    draws = np.concatenate([np.ones((1, len(seeds))), _resampled(seeds, cold_starts)])
    with np.errstate(invalid="ignore"):
        ratios = halves(one, draws) / halves(other, draws)
    value, known = float(ratios[0]), ratios[1:][np.isfinite(ratios[1:]) & (ratios[1:] > 0)]
    if not (math.isfinite(value) and value > 0) or len(known) < DRAWS / 2:
        return None
    low, high = _interval(known)
    own = math.exp(ERRORS * math.hypot(log_half_error(one), log_half_error(other)))
    return value, min(low, value / own), max(high, value * own)


def _curves(runs: Runs, weights_DS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """([D] a, [D] b, [V] the values' logs, [D, V] how many runs count); b = 0 where none of them collapsed."""
    values = sorted({value for of_seed in runs.values() for value in of_seed})
    there = np.array([[value in own for value in values] for own in runs.values()], dtype=np.float64)
    fell = np.array([[bool(own.get(value)) for value in values] for own in runs.values()], dtype=np.float64)
    counts, totals = weights_DS @ fell, weights_DS @ there
    a, b = firth(np.array(values), counts, totals)
    return a, np.where(counts.sum(axis=1) > 0, b, 0.0), np.log(values), totals


def _resampled(seeds: Sequence[int], cold_starts: Mapping[int, Hashable]) -> np.ndarray:
    """[DRAWS, seeds] how often each counts: of each cold start, all but one of as many as it has, drawn with
    replacement, and weighted to as many as it has. A seed that is alone stays."""
    rng = np.random.default_rng(0)
    groups: dict[Hashable, list[int]] = {}
    for place, seed in enumerate(seeds):
        groups.setdefault(cold_starts[seed], []).append(place)
    weights = np.zeros((DRAWS, len(seeds)))
    for group in groups.values():
        size = max(len(group) - 1, 1)
        drawn = rng.integers(0, len(group), (DRAWS, size))
        for column in drawn.T:
            weights[np.arange(DRAWS), np.array(group)[column]] += len(group) / size
    return weights


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    ordered = np.sort(drawn)
    ends = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    low, high = (float(ordered[min(int(end * len(ordered)), len(ordered) - 1)]) for end in ends)
    return low, high
