"""Two evaluations of the same prompts: the difference of their means, and how sure one may be of it.

Prompts are the unit, and both policies answered the same ones: the difference is taken prompt by prompt, which leaves
out what is hard or easy about a prompt (Miller 2024, arXiv 2411.00640, section 4.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_gspo.algorithm.evaluation import CONFIDENCE, Estimate, student_quantile

METHOD = (
    "mean of the differences by prompt with Student's t quantile, after one prompt with +1 and one with -1, of half a "
    "prompt's weight each, and one with 0 were added (Agresti and Min 2005)"
)


@dataclass(frozen=True)
class Counts:
    """On how many prompts which of two policies is better, by the mean over its samples."""

    first: int
    second: int
    same: int
    p_value: float
    """Of the exact sign test over the prompts that differ (with one sample each: McNemar's exact test), two-sided."""


def paired_difference(first_P: np.ndarray, second_P: np.ndarray) -> Estimate:
    """mean(second - first) over prompts with its 95% interval; [P] values in [0, 1] each, of the same prompts.

    The interval is Student's over P differences and pseudo-prompts: +1 and -1 with weight 1/2, 0 with weight 1, as
    Agresti and Min add 1/2 to each cell of a table of matched proportions ("Simple improved confidence intervals for
    comparing matched proportions", Statistics in Medicine 24, 2005, 729-740). Without them it has no width where the
    policies agree on every prompt, as two good ones do on few prompts. One prompt says nothing: [-1, 1].
    ``tests/unit/test_paired.py`` measures how often it holds the truth.
    """
    differences_P = np.asarray(second_P, dtype=np.float64) - np.asarray(first_P, dtype=np.float64)
    count, value = len(differences_P), float(differences_P.mean())
    if count == 1:
        return Estimate(value, -1.0, 1.0)
    total = count + 2
    center = float(differences_P.sum()) / total
    variance = (float((differences_P**2).sum()) + 1.0) / total - center**2
    half = student_quantile((1 + CONFIDENCE) / 2, count - 1) * math.sqrt(variance / total)
    return Estimate(value, max(-1.0, min(value, center - half)), min(1.0, max(value, center + half)))


def count_prompts(first_P: np.ndarray, second_P: np.ndarray) -> Counts:
    """Which policy is better on how many of the prompts."""
    better = int((np.asarray(first_P) > np.asarray(second_P)).sum())
    worse = int((np.asarray(first_P) < np.asarray(second_P)).sum())
    return Counts(better, worse, len(first_P) - better - worse, sign_test(better, worse))


def sign_test(first: int, second: int) -> float:
    """P(a split at least as uneven): 2 P(X <= min) for X ~ Binomial(first + second, 1/2), at most 1.

    Terms are summed from the largest on, each from the one before, in logarithms of their common factor: a hundred
    thousand prompts take milliseconds, and nothing overflows.

    >>> round(sign_test(0, 5), 12), sign_test(0, 0)
    (0.0625, 1.0)
    """
    count, least = first + second, min(first, second)
    largest = math.lgamma(count + 1) - math.lgamma(least + 1) - math.lgamma(count - least + 1) - count * math.log(2)
    share, term = 1.0, 1.0
    for i in range(least, 0, -1):
        term *= i / (count - i + 1)
        share += term
        if term < 1e-17 * share:
            break
    return min(1.0, 2 * math.exp(largest) * share)
