"""Differences of two evaluations of the same prompts."""

from __future__ import annotations

import math
import time
from fractions import Fraction

import numpy as np
import pytest

from megatron_gspo.algorithm.evaluation import student_quantile
from megatron_gspo.algorithm.paired import count_prompts, paired_difference, sign_test


def test_the_difference_is_that_of_the_means_and_its_sign_that_of_the_second() -> None:
    first_P, second_P = np.array([0.0, 0.5, 1.0, 1.0]), np.array([1.0, 0.5, 1.0, 0.75])
    found = paired_difference(first_P, second_P)
    assert found.value == pytest.approx((1.0 + 0.0 + 0.0 - 0.25) / 4)
    back = paired_difference(second_P, first_P)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_with_one_sample_each_it_is_agresti_and_mins_interval() -> None:
    """From their formula: half a prompt is added to each cell of the table; n + 2 in all."""
    both, only_first, only_second, neither = 40, 12, 5, 23
    first_P = np.repeat([1.0, 1.0, 0.0, 0.0], [both, only_first, only_second, neither])
    second_P = np.repeat([1.0, 0.0, 1.0, 0.0], [both, only_first, only_second, neither])
    n, b, c = len(first_P) + 2, only_first + 0.5, only_second + 0.5
    center = (c - b) / n
    half = student_quantile(0.975, n - 3) * math.sqrt((b + c) - (b - c) ** 2 / n) / n
    found = paired_difference(first_P, second_P)
    assert (found.low, found.high) == pytest.approx((center - half, center + half))


def test_policies_that_agree_everywhere_leave_a_doubt_and_one_prompt_says_nothing() -> None:
    same = paired_difference(np.ones(10), np.ones(10))
    assert same.value == 0.0 and same.low < 0.0 and same.high == -same.low
    assert (paired_difference(np.zeros(1), np.ones(1)).low, paired_difference(np.zeros(1), np.ones(1)).high) == (-1, 1)


def test_prompts_are_counted_for_the_better_one() -> None:
    counts = count_prompts(np.array([1.0, 0.5, 0.0, 0.25]), np.array([0.0, 0.5, 1.0, 0.0]))
    assert (counts.first, counts.second, counts.same) == (2, 1, 1)
    assert counts.p_value == 1.0


def test_the_sign_test_counts_every_split_that_is_as_uneven() -> None:
    for first, second in ((0, 5), (1, 9), (3, 3), (7, 2), (0, 0)):
        n = first + second
        extreme = [k for k in range(n + 1) if abs(2 * k - n) >= abs(first - second)]
        assert sign_test(first, second) == pytest.approx(sum(math.comb(n, k) for k in extreme) / 2**n)


def coverage(prompts: int, samples: int, gain: float, trials: int, alike: float) -> float:
    """Chances of a right answer are Beta(1, 1) for both, the same for a share ``alike`` of the prompts; the second
    policy solves a share ``gain`` of the others' failures."""
    draw = np.random.default_rng(5)
    held = 0
    for _ in range(trials):
        first_P = draw.beta(1, 1, prompts)
        second_P = np.where(draw.random(prompts) < alike, first_P, first_P + gain * (1 - first_P))
        found = paired_difference(*(draw.binomial(samples, chances) / samples for chances in (first_P, second_P)))
        held += found.low <= 0.5 * gain * (1 - alike) <= found.high
    return held / trials


@pytest.mark.parametrize(("prompts", "samples"), [(10, 1), (30, 8), (200, 1)])
def test_the_interval_of_a_difference_holds_the_truth_about_as_often_as_it_says(prompts: int, samples: int) -> None:
    assert coverage(prompts, samples, gain=0.3, trials=1000, alike=0.3) >= 0.93


@pytest.mark.slow_suite
@pytest.mark.parametrize("prompts", [5, 10, 30, 200])
@pytest.mark.parametrize("samples", [1, 8])
@pytest.mark.parametrize(("gain", "alike"), [(0.0, 0.0), (0.1, 0.5), (0.5, 0.2)])
def test_coverage_of_differences_over_many_simulated_evaluations(
    prompts: int, samples: int, gain: float, alike: float
) -> None:
    held = coverage(prompts, samples, gain, trials=10_000, alike=alike)
    print(f"{prompts} prompts x {samples}, gain {gain}, alike {alike}: {held:.4f}")
    assert held >= 0.945


@pytest.mark.parametrize(("first", "second"), [(0, 1), (3, 3), (2, 9), (40, 61), (300, 420), (0, 1000), (700, 700)])
def test_the_sign_test_is_the_exact_sum_of_binomials(first: int, second: int) -> None:
    count = first + second
    exact = Fraction(2 * sum(math.comb(count, i) for i in range(min(first, second) + 1)), 2**count)
    assert sign_test(first, second) == pytest.approx(min(1.0, float(exact)), rel=1e-9)


def test_the_sign_test_of_a_hundred_thousand_prompts_takes_no_time() -> None:
    began = time.process_time()
    assert sign_test(49_000, 51_000) == pytest.approx(2.6e-10, rel=0.1)
    assert sign_test(10, 1_000_000) == 0.0
    assert time.process_time() - began < 0.5
