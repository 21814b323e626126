"""The statistics of a comparison, against numbers worked by hand and against what they promise in simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gspo.algorithm import comparison
from megatron_gspo.algorithm.comparison import (
    collapse_index,
    geometric_mean,
    holm,
    mean_over_seeds,
    sign_flip_p,
    smallest_p,
)


def test_with_three_cold_starts_the_interval_is_students_over_their_means():
    """Means 1, 2, 6: mean 3, sd sqrt(7), t(2 df) = 4.302653, half width 4.302653 sqrt(7 / 3) = 6.572413."""
    mean = mean_over_seeds([0.0, 2.0, 1.0, 3.0, 6.0, 6.0], "aabbcc")
    assert mean.value == pytest.approx(3.0)
    assert (mean.low, mean.high) == pytest.approx((3 - 6.572413, 3 + 6.572413), abs=1e-5)
    assert (mean.seeds, mean.cold_starts, mean.clustered) == (6, 3, True)


def test_seeds_that_repeat_a_cold_start_add_nothing_to_it():
    once = mean_over_seeds([1.0, 2.0, 6.0], "abc")
    eight_times = mean_over_seeds([1.0, 2.0, 6.0] * 8, "abc" * 8)
    assert (eight_times.low, eight_times.high) == pytest.approx((once.low, once.high))


def test_each_cold_start_counts_the_same():
    assert mean_over_seeds([0.0, 0.0, 0.0, 3.0, 6.0], "aaabc").value == pytest.approx(3.0)


def test_with_two_cold_starts_the_interval_is_students_over_seeds():
    """1, 2, 3, 4: mean 2.5, sd sqrt(5 / 3), t(3 df) = 3.182446, half width 3.182446 * 1.290994 / 2 = 2.054260."""
    mean = mean_over_seeds([1.0, 2.0, 3.0, 4.0], "aabb")
    assert (mean.value, mean.low, mean.high) == pytest.approx((2.5, 2.5 - 2.054260, 2.5 + 2.054260), abs=1e-5)
    assert not mean.clustered


def test_one_seed_has_no_interval():
    assert mean_over_seeds([0.5], "a") == comparison.Mean(0.5, None, None, 1, 1, False)


def test_no_seeds_and_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="0 values"):
        mean_over_seeds([], [])
    with pytest.raises(ValueError, match="2 values of 1 seeds"):
        mean_over_seeds([1.0, 2.0], "a")


def test_a_ratio_is_averaged_by_its_logarithm():
    """10 and 1000: geometric mean 100; t(1 df) = 12.7062, sd of log10 sqrt(2): half width 12.7062 decades."""
    mean = geometric_mean([10.0, 1000.0], "ab")
    assert mean.value == pytest.approx(100.0)
    assert mean.low is not None and mean.high is not None
    assert (math.log10(mean.low), math.log10(mean.high)) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-3)
    with pytest.raises(ValueError, match="positive"):
        geometric_mean([1.0, 0.0], "ab")


def test_flips_are_counted_by_hand():
    """1, 2, -0.5 has the sum 2.5. Of the eight patterns +-1 +-2 +-0.5, those of size >= 2.5: 3.5, 2.5 and mirrors."""
    assert sign_flip_p([1.0, 2.0, -0.5]) == 4 / 8


@pytest.mark.parametrize("seeds", [1, 2, 5, 16, 20])
def test_differences_of_one_sign_give_the_smallest_p(seeds):
    assert sign_flip_p([0.1 + 0.01 * i for i in range(seeds)]) == 2.0 ** (1 - seeds) == smallest_p(seeds)


def test_no_difference_anywhere_gives_p_1():
    assert sign_flip_p([0.0] * 6) == 1.0


def test_all_patterns_are_as_counted_one_by_one():
    values = np.random.default_rng(1).normal(0.3, 1.0, size=9)
    sizes = [abs(np.dot(signs, values)) for signs in itertools.product([-1, 1], repeat=9)]
    assert sign_flip_p(values.tolist()) == pytest.approx(np.mean([size >= abs(values.sum()) - 1e-9 for size in sizes]))


def test_ties_in_another_order_of_summation_are_ties():
    assert sign_flip_p([0.1, 0.2, 0.3]) == sign_flip_p([0.3, 0.2, 0.1]) == 2 / 8
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0


def test_the_test_weighs_cold_starts_as_the_mean_does():
    """Cold start a has two seeds, b and c one: weights 1/6, 1/6, 1/3, 1/3, so 3, 3, -1, -1 are 1/2, 1/2, -1/3, -1/3."""
    weighted = [3 / 6, 3 / 6, -1 / 3, -1 / 3]
    sizes = [abs(np.dot(signs, weighted)) for signs in itertools.product([-1, 1], repeat=4)]
    expected = np.mean([size >= 1 / 3 - 1e-9 for size in sizes])
    assert sign_flip_p([3.0, 3.0, -1.0, -1.0], "aabc") == pytest.approx(expected)
    assert expected != sign_flip_p([3.0, 3.0, -1.0, -1.0])


def test_many_seeds_are_drawn_and_agree_with_the_exact_share(monkeypatch):
    values = np.random.default_rng(2).normal(0.25, 1.0, size=18).tolist()
    exact = sign_flip_p(values)
    monkeypatch.setattr(comparison, "MAX_EXACT", 10)
    assert sign_flip_p(values) == pytest.approx(exact, abs=4 * math.sqrt(exact / comparison.DRAWS))
    assert sign_flip_p([1.0] * 40) == pytest.approx(1 / (comparison.DRAWS + 1))


def test_holm_by_hand():
    """0.01, 0.04, 0.03, 0.005 -> times 3, 1, 2, 4 = 0.03, 0.04, 0.06, 0.02; 0.04 comes after 0.06 and becomes it."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_collapse_is_the_first_five_step_mean_under_half_its_peak():
    """Ten steps of 0.8, then 0.1: five-step means 0.8 to step 9, then 0.66, 0.52, 0.38 < 0.4 at step 12."""
    assert collapse_index([0.8] * 10 + [0.1] * 10) == 12


def test_a_collapse_is_measured_against_the_peak_so_far():
    assert collapse_index([0.1] * 10 + [0.8] * 10) is None
    assert collapse_index([0.8] * 5 + [0.5] * 20) is None
    assert collapse_index([0.8] * 4) is None
    assert collapse_index([0.8] * 5 + [0.0] * 5 + [0.8] * 9) == 7  # means 0.64, 0.48, 0.32


def simulated_coverage(cluster_sd: float, clustered: bool, draws: int = 2000) -> float:
    """Share of the intervals that hold the true mean 0: four cold starts of four seeds, normal, seeds of sd 1."""
    rng = np.random.default_rng(3)
    names = [c for c in range(4) for _ in range(4)] if clustered else [0] * 16
    values = rng.normal(size=(draws, 4, 1)) * cluster_sd + rng.normal(size=(draws, 4, 4))
    means = [mean_over_seeds(row.ravel().tolist(), names) for row in values]
    return float(np.mean([mean.low <= 0 <= mean.high for mean in means]))


@pytest.mark.parametrize("cluster_sd", [0.0, 1.0])
def test_the_interval_covers_whatever_cold_starts_do(cluster_sd):
    assert simulated_coverage(cluster_sd, clustered=True) == pytest.approx(0.95, abs=0.015)


def test_an_interval_over_seeds_would_not():
    assert simulated_coverage(1.0, clustered=False) < 0.8


def test_the_sign_flip_test_rejects_a_true_null_as_often_as_it_says():
    values = np.random.default_rng(4).standard_t(2, size=(2000, 8))
    rejected = np.mean([sign_flip_p(row.tolist()) <= 0.05 for row in values])
    assert 0.035 < rejected <= 0.05 + 0.01


@given(
    st.lists(st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False), min_size=1, max_size=6),
    st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_ratios_of_any_size_have_a_mean_with_finite_bounds(ratios: list[float], clustered: bool) -> None:
    """Student's quantile of two seeds is 12.7: a bound of 1e-300 and 1e300 lies beyond what a float holds."""
    mean = geometric_mean(ratios, range(len(ratios)) if clustered else ["one"] * len(ratios))
    for value in (mean.value, mean.low, mean.high):
        assert value is None or math.isfinite(value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_difference_that_is_no_number_is_refused_and_not_called_significant(value: float) -> None:
    with pytest.raises(ValueError, match="that are no numbers"):
        sign_flip_p([0.1, value, 0.3])
