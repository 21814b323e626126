"""What a comparison of training runs may claim: intervals that know which runs share a cold start, an exact test.

The unit is a seed: one run of each arm on the same prompts in the same order, from the same cold start. Differences are
taken within a seed, so what a seed or a cold start does to both arms alike cancels. What does not cancel is how much
an arm's *advantage* depends on the cold start: seeds of one cold start then tell nearly the same story several times.

Two questions are kept apart, because few cold starts answer them very differently:

- *Would it hold from another cold start?* ``mean_over_seeds``: an interval over cold starts, not over seeds.
- *Does it make any difference from these cold starts?* ``sign_flip_p``: an exact test over seeds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_gspo.algorithm.evaluation import student_quantile

CONFIDENCE = 0.95
MIN_COLD_STARTS = 3
"""With two cold starts Student's t has one degree of freedom and a quantile of 12.7: such an interval says nothing."""
MAX_EXACT = 20
"""Up to so many seeds all 2^n flips are counted; above, ``DRAWS`` random ones."""
DRAWS = 1 << 17
COLLAPSE_WINDOW = 5


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and its 95% interval; ``low`` and ``high`` are None where one value says nothing of spread."""

    value: float
    low: float | None
    high: float | None
    seeds: int
    cold_starts: int
    clustered: bool
    """Whether the interval is over cold starts (then it speaks of other cold starts too) or over seeds."""


def mean_over_seeds(values_S: Sequence[float], cold_starts_S: Sequence[Hashable]) -> Mean:
    """The mean of one value a seed, [S], with a 95% interval for what other seeds, and other cold starts, would give.

    Model: x_cs = mu + b_c + e_cs for seed s of cold start c, b ~ (0, B), e ~ (0, E) independent. Seeds of one cold
    start share b_c, so Var(mean) = B / C + E / S with C cold starts and S seeds; the usual s / sqrt(S) estimates
    (B + E) / S and is too small by up to sqrt(S / C) when B dominates. The C cold starts' own means m_c are
    independent, each of variance B + E / n_c whatever B is, so with equal n_c

        (mean(m_c) - mu) / (sd(m_c) / sqrt(C))  ~  Student's t, C - 1 degrees of freedom,

    exactly for normal b and e, and nearly for unequal n_c. The value is mean(m_c): each cold start counts the same.
    Assumes that cold starts are drawn independently of each other; with C = 3 the quantile is 4.3 and with 4 it is 3.2,
    which is what so few cold starts are worth. With fewer than ``MIN_COLD_STARTS`` the interval is Student's over
    seeds, S - 1 degrees of freedom: it takes B as 0, so it holds for these cold starts and no others.
    Raises ValueError for no values, and for lengths that differ.
    """
    values, names = np.asarray(values_S, dtype=np.float64), list(cold_starts_S)
    if not len(values) or len(values) != len(names):
        raise ValueError(f"{len(values)} values of {len(names)} seeds")
    groups = {name: [value for value, other in zip(values, names, strict=True) if other == name] for name in names}
    clustered = len(groups) >= MIN_COLD_STARTS
    units = np.array([np.mean(group) for group in groups.values()]) if clustered else values
    value = float(units.mean())
    if len(units) < 2:
        return Mean(value, None, None, len(values), len(groups), clustered)
    error = float(units.std(ddof=1)) / math.sqrt(len(units))
    half = student_quantile((1 + CONFIDENCE) / 2, len(units) - 1) * error
    return Mean(value, value - half, value + half, len(values), len(groups), clustered)


def geometric_mean(ratios_S: Sequence[float], cold_starts_S: Sequence[Hashable]) -> Mean:
    """The same of positive ratios: ``mean_over_seeds`` of their logarithms, taken back."""
    if min(ratios_S, default=1.0) <= 0:
        raise ValueError(f"a ratio must be positive: {min(ratios_S)}")
    mean = mean_over_seeds(np.log(ratios_S).tolist(), cold_starts_S)
    low, high = (None if bound is None else _exp(bound) for bound in (mean.low, mean.high))
    return Mean(_exp(mean.value), low, high, mean.seeds, mean.cold_starts, mean.clustered)


def _exp(value: float) -> float:
    """exp, and the largest float where it would overflow: a bound so far away is none, and JSON has no infinity."""
    return math.exp(min(value, math.log(sys.float_info.max)))


def sign_flip_p(differences_S: Sequence[float], cold_starts_S: Sequence[Hashable] | None = None) -> float:
    """The two-sided p of Fisher's sign-flip test: the share of sign patterns whose mean is at least as large in size.

    Null hypothesis: in no seed does it matter which of the two arms ran. Then each difference could as well have had
    the other sign, independently of the others given the cold starts, and all 2^S patterns are equally likely: no
    distribution is assumed and the p is exact. The flips are over seeds on purpose. Flipping whole cold starts would
    test the weaker null of a mean of 0 over all cold starts, but four of them give no p below 2 / 2^4 = 0.125. So a
    small p says that the arms differ *from these cold starts*; that it extends to others is the clustered interval's to
    say.
    The mean weighs seeds as ``mean_over_seeds`` does. The smallest possible p is 2^(1 - S).
    Above ``MAX_EXACT`` seeds: ``DRAWS`` seeded random patterns and the one seen, (hits + 1) / (draws + 1), never below
    the exact p in expectation. Raises ValueError for no
    differences, and for one that is not finite.
    """
    differences = np.asarray(differences_S, dtype=np.float64) * _weights(len(differences_S), cold_starts_S)
    if not len(differences) or not np.isfinite(differences).all():  # a NaN would be beaten by no pattern: p = 0
        raise ValueError(f"no differences, or some that are no numbers: {list(differences_S)[:8]}")
    seen = abs(float(differences.sum())) - 1e-12 * float(np.abs(differences).sum())  # sums in another order are equal
    if len(differences) > MAX_EXACT:
        signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0]), size=(DRAWS, len(differences)))
        return float((np.count_nonzero(np.abs(signs @ differences) >= seen) + 1) / (DRAWS + 1))
    sums = differences[:1]  # a pattern and its mirror image have the same size: the first sign stays
    for difference in differences[1:]:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= seen))


def smallest_p(seeds: int) -> float:
    """The smallest p that ``sign_flip_p`` can give."""
    return 2.0 ** (1 - seeds) if seeds <= MAX_EXACT else 1 / (DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p, in the order given: the i-th smallest of m times m - i + 1, never less than one before it.

    Rejecting where it is at most alpha keeps the chance of any false rejection among the m at alpha, whatever the
    dependence between the tests (Holm 1979).
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = largest
    return adjusted


def collapse_index(rewards_T: Sequence[float]) -> int | None:
    """The first position whose trailing five-step mean lies under half of the largest one up to there.

    None: never (censored at the end), or fewer than five values. A collapse that recovers later counts.
    """
    rewards = np.asarray(rewards_T, dtype=np.float64)
    if len(rewards) < COLLAPSE_WINDOW:
        return None
    means = np.convolve(rewards, np.full(COLLAPSE_WINDOW, 1 / COLLAPSE_WINDOW), mode="valid")
    fallen = np.flatnonzero(means < 0.5 * np.maximum.accumulate(means))
    return int(fallen[0]) + COLLAPSE_WINDOW - 1 if len(fallen) else None


def _weights(seeds: int, cold_starts_S: Sequence[Hashable] | None) -> np.ndarray:
    """[S] float64, sum 1: each cold start the same where ``mean_over_seeds`` clusters, else each seed."""
    names = list(cold_starts_S) if cold_starts_S is not None else []
    if len(set(names)) < MIN_COLD_STARTS:
        return np.full(seeds, 1 / max(1, seeds))
    return np.array([1 / (len(set(names)) * names.count(name)) for name in names])
